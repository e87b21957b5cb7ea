"""Every flag of every script and tool: what it takes of odd values, from the parsers themselves; others' names."""

import importlib
import re

import pytest

import main_finetune
import main_pretrain
from utils.args import HINTS, SYNONYMS
from utils.errors import suggest
from utils.slurm import OPTIONS, add_slurm_arguments

TOOLS = ("benchmark", "export", "mean_std", "plot", "predict", "probe", "roofline", "shrink", "visualize")
VALUES = ("", "nan", "inf", "-inf", "-1", "0", "1.5", "1e308", str(2**64), str(10**40), "text")

# Which flags take such a value; the others refuse it, but for those of TEXT, which are checked where they are used.
MEANT = {
    "0": "mask_ratio mask_ratios color_jitter cutmix cutmix_minmax drop_path head_init_scale knn_freq health_freq "
    "lr blr min_lr local_rank max_bad_images mean mixup mixup_prob mixup_switch_prob momentum decoder_depth "
    "model_ema_decay nodata num_workers opt_betas reprob save_ckpt_steps seed seeds split_seed smoothing "
    "start_epoch stage vis_freq warmup_epochs warmup_steps weight_decay weight_decay_end images tolerance "
    "num_classes max_requeues patience freeze_stages bce_target_thresh",
    str(2**64): "mean nodata",
    "-1": "mean nodata local_rank warmup_steps",
    **dict.fromkeys(("nan", "inf", "text"), "sbatch"),  # long options without a value
    "1.5": "lr blr min_lr weight_decay weight_decay_end mean std nodata clip_grad color_jitter mixup cutmix "
    "head_init_scale temperature tolerance mem_gb minutes dist_timeout tflops bandwidth",
}
TEXT = (
    "model data_path eval_data_path data_set train_list eval_list output_dir resume log_dir wandb initial_checkpoint "
    "finetune model_key model_prefix opt aa checkpoint checkpoints output job_dir partition account qos constraint "
    "comment setup exclude nodelist mail_user reservation gres gpus_per_task mem_per_cpu "
    "keys folders images runs json memory_of vary x class_weights check_on masks eval_masks picture"
)


def parsers() -> dict:
    found = {script.__name__: script.get_args_parser() for script in (main_pretrain, main_finetune)}
    add_slurm_arguments(submitted := main_finetune.get_args_parser())
    found["submitit_finetune"] = submitted
    return found | {name: importlib.import_module(f"tools.{name}").get_args_parser() for name in TOOLS}


PARSERS = parsers()
FLAGS = [
    (name, action.option_strings[0])
    for name, parser in PARSERS.items()
    for action in parser._actions
    if action.option_strings and "--help" not in action.option_strings
]


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_odd_values_are_refused_or_meant(script, flag, capsys):
    """Refused in one line that names the flag and the value."""
    action = PARSERS[script]._option_string_actions[flag]
    if action.dest in TEXT.split() and not action.choices:
        return
    for value in VALUES:
        meant = action.dest in MEANT.get(value, "").split() or (action.const is True and value == "0")
        parser = main_pretrain.ArgumentParser("")
        parser._add_action(action)
        words = [flag, *[value] * action.nargs] if isinstance(action.nargs, int) else [f"{flag}={value}"]
        if meant:
            parser.parse_args(words)
            continue
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        line = capsys.readouterr().err
        assert re.fullmatch(r"error: .*\n", line)
        assert flag in line
        assert value in line or action.nargs == 2  # of which argparse takes -inf for a flag


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_others_names(script, capsys):
    """A synonym is the flag's, with hyphens too; a hint names a flag that is there."""
    parser = script.get_args_parser()
    for name, flag in SYNONYMS.items():
        assert name not in parser._option_string_actions
        if flag in parser._option_string_actions:
            assert parser._known(f"{name.replace('_', '-')}=3" if name[1] == "-" else f"{name}=3") == f"{flag}=3"
    assert parser.parse_args(["-b", "3", "--accum-iter=2", "--no-fused"]).update_freq == 2
    for name in HINTS.keys() - parser._option_string_actions.keys():
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([name])
        line, flags = capsys.readouterr().err, set(re.findall(r"--\w+", HINTS[name]))
        if not flags or flags & parser._option_string_actions.keys():
            assert line == f"error: unknown argument {name}: {HINTS[name]}; see --help\n"


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_only_a_close_flag_is_suggested(script, capsys):
    """A letter left out or two changed over is found again; a flag of timm that has no counterpart is like none."""
    parser = script.get_args_parser()
    known = [flag for flag in parser._option_string_actions if len(flag) > 4]
    for flag in known:
        for i in range(2, len(flag) - 1):
            for typed in {flag[:i] + flag[i + 1 :], flag[:i] + flag[i + 1] + flag[i] + flag[i + 2 :]} - {*known}:
                assert suggest(typed, known).startswith(" (did you mean --")
    for name in ("fast_norm", "synchronize_step", "jsd_loss", "tta", "focal_loss", "decay_milestones", "lr_cycle_mul"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"--{name}", "1"])
        assert capsys.readouterr().err == f"error: unknown argument --{name}; see --help\n"


def test_a_hint_names_flags_that_the_script_has(capsys):
    with pytest.raises(SystemExit, match="2"):
        PARSERS["predict"].parse_args(["--checkpoint", "x.pth", "--images", "x", "--finetune", "y.pth"])
    assert "--finetune is of main_finetune.py" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        PARSERS["predict"].parse_args(["--checkpoint", "x.pth", "--images", "x", "--hflip", "1"])  # which mirrors none
    assert capsys.readouterr().err == "error: unknown argument --hflip; see --help\n"


@pytest.mark.parametrize("script", PARSERS)
def test_flags_of_other_scripts(script, capsys):
    """Each is said to be of scripts that have it, and of those alone; but for what is handed on to sbatch."""
    parser = PARSERS[script]
    own, needed = (
        parser._option_string_actions,
        [x.option_strings[0] for x in parser._actions if x.required and x.option_strings],
    )
    given = ["run"] if script == "plot" else [word for flag in needed for word in (flag, "timm")]
    for flag in sorted({flag for _, flag in FLAGS} - {f"--{name}" for name in OPTIONS} - own.keys() - HINTS.keys()):
        meant = SYNONYMS.get(flag, flag)
        if meant in own:
            continue
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([*given, flag])
        line = capsys.readouterr().err
        named = re.fullmatch(f"error: unknown argument {flag}: {meant} is of (.+); see --help\n", line)
        assert named, line
        for name in named[1].split(", "):
            assert meant in PARSERS[name.removeprefix("tools/").removesuffix(".py")]._option_string_actions


def test_a_synonym_of_a_flag_of_another_script(capsys):
    with pytest.raises(SystemExit, match="2"):
        main_pretrain.get_args_parser().parse_args(["--early-stopping", "3"])
    said = "error: unknown argument --early_stopping: --patience is of main_finetune.py; see --help\n"
    assert capsys.readouterr().err == said
