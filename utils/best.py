"""Which epoch was best by --best_metric, and whether --patience is over."""

import logging
import math

log = logging.getLogger("fcmae")

SUFFIXES = "", "_ema"  # of the model's scores, and of its moving average's


class Best:
    """The best scores of a run so far.

    Attributes:
        found: what checkpoints keep: the best value and its epoch of each, and how many evaluations were no better.
    """

    def __init__(self, metric: str = "acc1", patience: int = 0):
        self.metric, self.patience, self.found = metric, patience, {}

    def load(self, found: dict, source: object) -> None:
        """Take up what the checkpoint `source` keeps, unless that is of another metric; without patience, no wait."""
        best = {name for name in found if name != "waited"}
        if best and not any(f"{self.metric}{suffix}" in best for suffix in SUFFIXES):
            log.info("--best_metric %s: %s has the best by another metric; from here on, anew", self.metric, source)
        else:
            self.found = found if self.patience else {name: found[name] for name in best}

    def update(self, epoch: int, scores: dict[str, float]) -> list[str]:
        """Take up an evaluation's scores; the suffixes of those that are the best so far."""
        better, sign = [], -1 if self.metric == "loss" else 1
        for suffix in SUFFIXES:
            name = f"{self.metric}{suffix}"
            value, before = (sign * x.get(name, -sign * math.inf) for x in (scores, self.found))
            if value > before and math.isfinite(scores.get(f"loss{suffix}", 0.0)):
                better.append(suffix)
                self.found = self.found | {name: scores[name], f"epoch{suffix}": epoch}
        if scores and self.patience:
            self.found = self.found | {"waited": 0 if better else self.found.get("waited", 0) + 1}
        return better

    def out_of_patience(self) -> str:
        """Why a run ends early, or ''."""
        if not 0 < self.patience <= self.found.get("waited", 0):
            return ""
        return f"no better {self.metric} in {self.found['waited']} evaluations{self}; a larger --patience goes on"

    def __str__(self) -> str:
        """For console lines: ', best acc1 ...', or '' before the first evaluation."""
        digits, found = 4 if self.metric == "loss" else 2, self.found
        said = [(f"{self.metric}{x}", found.get(f"epoch{x}")) for x in SUFFIXES]
        return "".join(f", best {x} {found[x]:.{digits}f} in epoch {epoch}" for x, epoch in said if x in found)
