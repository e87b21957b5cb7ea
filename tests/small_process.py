"""An entry script as a process of its own, with the smallest network of the tests: small_process.py NAME FLAGS."""

import importlib
import os
import sys

import torch

from models.convnextv2 import SIZES
from tests.small_runs import TINY, poison
from utils import errors
from utils.amp import Amp

if __name__ == "__main__":
    torch.set_num_threads(1)
    SIZES["convnextv2_atto"] = TINY
    name, *flags = sys.argv[1:]
    script = importlib.import_module(name)
    fail_on, step = os.environ.get("FAIL_ON_RANK"), Amp.step
    kill_file = os.environ.get("KILL_ONCE")

    def failing_step(*args, **kwargs):
        if fail_on and fail_on == os.environ.get("RANK"):
            raise RuntimeError("rank failed on purpose")
        if kill_file and os.environ.get("RANK") == "1" and not os.path.exists(kill_file) and failing_step.taken == 7:
            open(kill_file, "w").close()
            os.kill(os.getpid(), 9)
        failing_step.taken += 1
        return step(*args, **kwargs)

    if os.environ.get("NAN_ON_RANK") == os.environ.get("RANK", "0"):
        poison(setattr, os.environ["NAN_IN"], range(int(os.environ["NAN_AT"]), int(os.environ["NAN_AT"]) + 1))
    if os.environ.get("OTHER_SCORES_ON_RANK") == os.environ.get("RANK", "0"):
        score = script.score
        script.score = lambda *args: {name: -value for name, value in score(*args).items()}
    failing_step.taken = 0
    Amp.step = failing_step
    errors.run_cli(lambda: script.main(script.get_args_parser().parse_args(flags)))
