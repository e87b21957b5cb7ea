"""Curves of one or several runs in one picture, a panel per key, and their last and best values as a table.

python tools/plot.py output/finetune
python tools/plot.py output/a output/b --keys train_loss test_acc1 --output compared.png
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import ArgumentParser
from utils.distributed import setup_logging
from utils.errors import UsageError, refuse, run_cli, suggest

log = logging.getLogger("fcmae")

Points = list[tuple[float, float]]
Curves = dict[str, dict[str, Points]]  # of each key, each run's


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with a log.txt, the --output_dir of a run")
    parser.add_argument("--output", default="curves.png", help="picture to write; '' for the table alone")
    parser.add_argument("--keys", nargs="+", default=None, help="what to draw; losses and accuracies where not given")
    parser.add_argument("--x", default="epoch", help="key of the horizontal axis")
    return parser


def read_log(folder: str) -> list[dict]:
    """The records of a run's log.txt; a damaged line is reported and skipped. Raises UsageError where there is none."""
    path = Path(folder) / "log.txt"
    if not path.is_file():
        below = ", ".join(str(found.parent) for found in sorted(Path(folder).glob("*/log.txt")))
        raise UsageError(f"{folder}: holds no log.txt; give {below or 'the --output_dir of a run'}")
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            records.append({**json.loads(line or "{}")})
        except (TypeError, ValueError):
            log.warning("%s: line %d is damaged, skipped", path, number)
    refuse(not any(records), f"{path}: holds no records")
    return records


def points(records: list[dict], x: str, key: str) -> Points:
    """(x, value) of the records that have both; a null, which stands for NaN, becomes NaN."""
    found = [(record[x], record[key]) for record in records if x in record and key in record]
    plain = [tuple(math.nan if value is None else value for value in pair) for pair in found]
    return [pair for pair in plain if all(isinstance(value, (int, float)) for value in pair)]


def choose(runs: dict[str, list[dict]], keys: list[str] | None, x: str) -> Curves:
    """The curves of `keys`, or else of the losses and accuracies that most runs have.

    Raises:
        UsageError: a key, or x, that no run has; nothing to draw.
    """
    names = dict.fromkeys(key for records in runs.values() for record in records for key in record)
    found = {key: {run: points(records, x, key) for run, records in runs.items()} for key in names}
    count = {key: sum(map(bool, curves.values())) for key, curves in found.items()}
    known = [key for key in names if count[key]] or list(names)
    for flag, name in [("--x", x), *(("--keys", key) for key in keys or [])]:
        refuse(name not in known, f"{flag} {name}: in none of the runs{suggest(name, known)}; {', '.join(known)}")
    keys = keys or [key for key in known if 2 * count[key] > len(runs) and better(key)]
    refuse(not keys, f"--keys: no loss or accuracy is in most of the runs; give some of {', '.join(known)}")
    return {key: found[key] for key in keys}


def better(key: str) -> Callable | None:
    """What picks the best of two values; None: nobody knows."""
    return min if "loss" in key else max if any(name in key for name in ("acc", "f1", "map")) else None


def best_of(key: str, values: Points) -> tuple[float, float] | None:
    """Where a loss is lowest or an accuracy highest, the first time; of other keys nobody knows."""
    values = [pair for pair in values if not math.isnan(pair[1])]
    best = better(key)
    return best(values, key=lambda pair: pair[1], default=None) if best else None


def table(curves: Curves, x: str) -> str:
    """Last and best value of every key in every run, in aligned columns."""
    rows = [("key", "run", "last", "best", f"at {x}")]
    for key, of_runs in curves.items():
        for run, values in of_runs.items():
            if values:
                best = best_of(key, values)
                found = (f"{best[1]:.4g}", f"{best[0]:g}") if best else ("", "")
                rows.append((key, run, f"{values[-1][1]:.4g}", *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True))
    return "\n".join(line.format(*row).rstrip() for row in rows)


def draw(curves: Curves, x: str):
    """A matplotlib figure with a panel per key; a run has the same colour in each."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a folder's name may hold $
    columns = len(curves) if len(curves) <= 3 else math.ceil(math.sqrt(len(curves)))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows + 0.5), layout="constrained")
    lines = {}
    for place, (key, of_runs) in enumerate(curves.items(), start=1):
        panel = figure.add_subplot(rows, columns, place, title=key, xlabel=x)
        for i, (run, values) in enumerate(of_runs.items()):
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "marker": "."}
            if values:
                (lines[run],) = panel.plot(*zip(*values, strict=True), label=run, **style)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=x in ("epoch", "layer"))
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=columns)
    return figure


def main() -> None:
    args = get_args_parser().parse_args()
    setup_logging()
    curves = choose({folder: read_log(folder) for folder in args.runs}, args.keys, args.x)
    print(table(curves, args.x))
    if args.output:
        if not Path(args.output).suffix:
            args.output += ".png"  # as matplotlib would, which does not tell
        try:
            draw(curves, args.x).savefig(args.output, dpi=120)
        except ImportError as error:
            more = "pip install matplotlib; --output '' prints the table alone"
            raise UsageError(f"--output {args.output}: needs a package more: {more}") from error
        except (OSError, ValueError) as error:  # no such folder; a format that matplotlib has not
            raise UsageError(f"--output {args.output}: cannot be written ({error})") from error
        print(f"curves in {args.output}")


if __name__ == "__main__":
    run_cli(main)
