"""The report of an evaluation: scores per class, what is confused with what, how far probabilities can be trusted."""

import csv
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import replace
from .distributed import gather, is_main_process
from .errors import UsageError
from .pictures import confusion_picture, shortened

log = logging.getLogger("fcmae")

SHOWN = 50  # classes in the picture and the table
MATRIX = 1000  # classes up to which report.json holds the whole matrix
BINS = 15  # of the calibration error
AVERAGES = ("macro", "weighted", "micro")
SCORES = ("precision", "recall", "f1", "support")
METRICS = {  # of --best_metric, in percent, what is of the report
    "balanced_acc": lambda report: 100 * report["balanced_accuracy"],
    "f1": lambda report: 100 * report["macro"]["f1"],
    "map": lambda report: 100 * report["mean_average_precision"],
    "f1_micro": lambda report: 100 * report["micro"]["f1"],
}
OF_LABELS = ("map", "f1", "f1_micro")  # what an evaluation tells of several labels an image


class Answers(NamedTuple):
    """What a classifier says of images: their numbers in the data set, labels, top-1 and its probability, (N,) each.

    Of several labels an image, the last three are (N, classes): what it has, what is predicted, probabilities.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor
    probabilities: torch.Tensor


def gathered(mine: list[torch.Tensor], spread: bool = True) -> tuple[torch.Tensor, ...]:
    """Columns of all processes, or if not `spread` of this one, in the order of the first; () where there are none.

    mine: of this process, [] where it has no rows.
    """
    parts = [part for part in (gather(mine) if spread else [mine]) if part]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return tuple(column[columns[0].argsort(stable=True)] for column in columns)


def calibration_error(answers: Answers) -> float:
    """Expected calibration error: the mean distance of accuracy and probability in 15 even bins of the latter."""
    probability = answers.probabilities.double()
    bins = (probability * BINS).ceil().long().clamp(1, BINS) - 1
    gap = (answers.predictions == answers.labels).double() - probability
    return torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, gap).abs().sum().item() / len(gap)


def count_pairs(answers: Answers, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Images of each label (row) and prediction (column) among the chosen of `count` classes: int64 (K, K)."""
    place = torch.full((count,), -1).scatter(0, chosen, torch.arange(len(chosen)))
    rows, columns = place[answers.labels], place[answers.predictions]
    cells = (rows * len(chosen) + columns)[(rows >= 0) & (columns >= 0)]
    return cells.bincount(minlength=len(chosen) ** 2).view(len(chosen), -1)


def average_precision(labels: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of each class the sum over thresholds of precision times the step of recall: (N, classes) both -> (classes,).

    That is the mean, over the images that have the label, of the precision among those that score as high; 0 of none.
    """
    found = []
    for label, score in zip(labels.T, scores.T.contiguous(), strict=True):
        theirs = score[label].sort().values
        true, images = (len(x) - torch.searchsorted(x, theirs) for x in (theirs, score.sort().values))
        found.append((true.double() / images).mean().nan_to_num(0))
    return torch.stack(found)


def f_scores(true: torch.Tensor, support: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Precision, recall and F1, (..., 3), of the numbers of right predictions, of labels and of predictions."""
    true = true.double()
    return torch.stack([true / predicted, true / support, 2 * true / (support + predicted)], -1).nan_to_num(0)


def summarise(answers: Answers, classes: list[str], stats: dict[str, float]) -> dict:
    """What report.json holds; what is 0 / 0 counts as 0.

    macro: over the classes that are a label or a prediction; balanced accuracy: over those that are a label. Of several
    labels an image, as in scikit-learn, all averages are over all classes.
    """
    several = answers.labels.dim() == 2
    labels, predictions = answers[1:3]
    hits = labels & predictions if several else labels[labels == predictions]
    columns = (hits, labels, predictions)
    true, support, predicted = (x.sum(0) if several else x.bincount(minlength=len(classes)) for x in columns)
    shares = f_scores(true, support, predicted)
    occurs, images = (support + predicted > 0) | several, support.double()
    averages = dict(zip(AVERAGES, (shares[occurs].mean(0), images @ shares / images.sum()), strict=False))
    found: dict = {name: value if math.isfinite(value) else None for name, value in stats.items()}  # JSON has no NaN
    found["images"] = len(answers.labels)
    found["classes"] = rows = [
        {"name": name} | dict(zip(SCORES, (*row, count), strict=True))
        for name, row, count in zip(classes, shares.tolist(), support.tolist(), strict=True)
    ]
    if several:
        averages["micro"] = f_scores(true.sum(), support.sum(), predicted.sum())
        precision = average_precision(answers.labels, answers.probabilities).tolist()
        found["mean_average_precision"] = sum(precision) / len(classes)
        for row, value in zip(rows, precision, strict=True):
            row["average_precision"] = value
    else:
        found |= confusions(answers, classes) | {"balanced_accuracy": shares[support > 0, 1].mean().item()}
    for name, values in averages.items():
        found[name] = dict(zip(SCORES, values.nan_to_num(0).tolist(), strict=False))
    return found


def confusions(answers: Answers, classes: list[str]) -> dict:
    """Of report.json, how far probabilities can be trusted, and what is taken for what."""
    error, wrong = calibration_error(answers), answers.labels != answers.predictions
    found = {"expected_calibration_error": error if math.isfinite(error) else None}
    pairs = Counter(zip(answers.labels[wrong].tolist(), answers.predictions[wrong].tolist(), strict=True))
    found["most_confused"] = [
        {"label": classes[i], "prediction": classes[j], "images": images}
        for (i, j), images in sorted(pairs.items(), key=lambda x: (-x[1], x[0]))[:20]
    ]
    if len(classes) <= MATRIX:
        found["confusion_matrix"] = count_pairs(answers, torch.arange(len(classes)), len(classes)).tolist()
    return found


def table(report: dict) -> list[str]:
    """The report as lines for people; of many classes those with the lowest F1."""
    rows = report["classes"]
    if len(rows) > SHOWN:
        rows = sorted((row for row in rows if row["support"]), key=itemgetter("f1"))[:SHOWN]
    known = filter(report.get, AVERAGES)
    support = sum(row["support"] for row in report["classes"])
    averages = [report[name] | {"name": f"{name} average", "support": support} for name in known]
    width = max(len(row["name"]) for row in (*rows, *averages))
    several, ap = "mean_average_precision" in report, "average_precision"
    lines = [f"{'class':{width}}  precision  recall      F1  support" + "      AP" * several]
    for row in (*rows, *averages):
        scores = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['support']:7}"
        lines.append(f"{row['name']:{width}}  {scores}" + (f"  {row[ap]:6.4f}" if ap in row else ""))
    if len(rows) < len(report["classes"]):
        lines.append(f"these are the {len(rows)} of {len(report['classes'])} classes with the lowest F1")
    if several:
        absent = [row["name"] for row in report["classes"] if not row["support"]]
        told = f"; {len(absent)} classes that no image has count as 0: {', '.join(absent[:10])}" if absent else ""
        return [*lines, f"mean average precision {report['mean_average_precision']:.4f}{told}"]
    error = report["expected_calibration_error"]
    error = math.nan if error is None else error
    lines.append(f"balanced accuracy {report['balanced_accuracy']:.4f}, expected calibration error {error:.4f}")
    worst = [f"{x['label']} as {x['prediction']} {x['images']}" for x in report["most_confused"][:10]]
    return [*lines, f"most confused: {', '.join(worst) or 'none'}"]


def most_confused(answers: Answers, count: int) -> torch.Tensor:
    """The numbers of at most 50 classes, those with most errors as label or prediction, in their order."""
    wrong = answers.labels != answers.predictions
    errors = sum(x[wrong].bincount(minlength=count) for x in (answers.labels, answers.predictions))
    return errors.argsort(descending=True, stable=True)[:SHOWN].sort().values


def as_csv(rows: Iterable) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def write_file(path: str | Path, write: Callable) -> None:
    """Write a file that a user asked for, or what it links to, see `replace`. Raises UsageError where that fails."""
    try:
        earlier = ", in place of an earlier one" * Path(path).exists()
        replace(os.path.realpath(path), write)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
    log.info("written: %s%s", path, earlier)


@dataclass
class Reporter:
    """Reports what `evaluate` found: a table in the log, report.json and confusion.png, and a file of predictions.

    evaluated: what was, for the report. path_of: the path of an image by its number. output_dir, predictions: "": no
    files. in_training: a full disk is reported, and training goes on. metric: of --best_metric.
    """

    evaluated: str
    classes: list[str]
    path_of: Callable[[int], str]
    output_dir: str
    predictions: str
    in_training: bool
    metric: str
    found: list[tuple] = field(default_factory=list)

    def __call__(self, answers: Answers, stats: dict[str, float], suffix: str = "") -> dict[str, float]:
        """Keep for `write` what has this suffix behind its files' names; the metric, where it is one of METRICS."""
        if not len(answers.labels):
            return {}
        report = {"evaluated": self.evaluated + suffix} | summarise(answers, self.classes, stats)
        self.found.append((answers, report, suffix))
        told = OF_LABELS if answers.labels.dim() == 2 else {self.metric} & METRICS.keys()
        return {name: METRICS[name](report) for name in told}

    def write(self) -> None:
        """Write, in the first process, what was kept. Raises UsageError where that fails, unless in training."""
        for kept in self.found if is_main_process() else ():
            self._write(*kept)

    def _write(self, answers: Answers, report: dict, suffix: str) -> None:
        classes, count, several = self.classes, len(self.classes), answers.labels.dim() == 2
        for line in table(report):
            log.info("%s", line)
        files: dict[Path, Callable] = {}
        if self.output_dir:
            content = json.dumps(report, indent=1).encode()
            files[Path(self.output_dir) / f"report{suffix}.json"] = lambda file: file.write(content)
            if not several:
                chosen = most_confused(answers, count)
                names = [shortened(classes[i], i) for i in chosen.tolist()]
                picture = confusion_picture(count_pairs(answers, chosen, count), names)
                files[Path(self.output_dir) / f"confusion{suffix}.png"] = partial(picture.save, format="png")
        if self.predictions:
            path, rows = Path(self.predictions), [("path", "label", "prediction", "probability")]
            for i, label, prediction, probability in zip(*(column.tolist() for column in answers), strict=True):
                if several:
                    names = (";".join(compress(classes, chosen)) for chosen in (label, prediction))
                    shares = ";".join(f"{share:.6f}" for share in compress(probability, prediction))
                    rows.append((self.path_of(i), *names, shares))
                else:
                    rows.append((self.path_of(i), classes[label], classes[prediction], f"{probability:.6f}"))
            files[path.with_stem(path.stem + suffix)] = lambda file: file.write(as_csv(rows))
        try:
            for path, write in files.items():
                write_file(path, write)
        except UsageError as error:
            if not self.in_training:
                raise
            log.error("%s; training goes on", error)
