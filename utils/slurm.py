"""The cluster's flags, the submission, and the callable that submitit runs on every task."""

import argparse
import glob
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from .args import ArgumentParser, add_bool, positive, prepared_output_dir, whole
from .errors import UsageError, refuse, run_cli
from .flags import INPUTS
from .lock import OutputLock
from .named_files import FOLDERS, data_path

ROOT = Path(__file__).resolve().parent.parent
# as `python -m submitit.core._submit`, but the folder of the submission may hold other modules of the same names
START = f"import sys; sys.path[:] = [{str(ROOT)!r}, *filter(None, sys.path)]; del sys.argv[1:-1]; "
START += "from submitit.core.submission import submitit_main; submitit_main()"
PYTHON = shlex.join([sys.executable, "-u", "-c", START])
INHERITED = ("SLURM", "SUBMITIT_", "TORCHELASTIC_", "OMPI_", "PMI_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
PLACES = "job_dir", "output_dir", "log_dir", "predictions"  # in which %j is the job
OPTIONS = {  # sbatch's, handed on
    "partition": "partition to submit to",
    "constraint": "features the nodes must have",
    "account": "account to charge",
    "qos": "quality of service",
    "comment": "comment for the scheduler",
    "reservation": "reservation to run in",
    "exclude": "nodes to leave out",
    "gres": "GPUs per node as gpu:TYPE:NUMBER",
    "gpus_per_task": "GPUs that each task sees alone: 1",
    "mem_per_cpu": "memory per core, as 4G",
}
HINTS = {  # words of sbatch -> the flag to change
    "account": "--account",
    "partition": "--partition",
    "feature": "--constraint",
    "qos": "--qos",
    "time limit": "--timeout",
    "memory": "--mem_gb",
    "generic resource|gres": "--ngpus, --device cpu, or --sbatch gres=...",
    "node configuration": "--ngpus (GPUs per node; none with --device cpu), --cpus_per_task, --mem_gb or --constraint",
    "node count": "--nodes",
    "cpu": "--cpus_per_task",
}


def minutes(text: str) -> int:
    """An argparse type: minutes, or as SLURM has it, [days-]hours:minutes:seconds and what may be left out of that."""
    days, dash, rest = text.rpartition("-")
    fields = rest.split(":")
    numbers = all(field.isdecimal() for field in [*fields, *([days] if dash else [])])
    if not numbers or len(fields) > 3 or not text.strip("0:-") or len(text) > 16:
        raise argparse.ArgumentTypeError(f"{text}: must be minutes, at least 1, or [days-]hours:minutes:seconds")
    hours, mins, secs, *_ = map(int, [*("" if dash or len(fields) == 3 else "0"), *fields, 0, 0])
    return int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)


def option(text: str) -> tuple[str, str | bool]:
    """An argparse type: key=value of sbatch; key alone for those that have no value; key= takes a default away."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not re.fullmatch("[a-z][a-z_-]*", key) or key in ("time", "array"):
        more = "; the time is --timeout's" if key == "time" else ""
        raise argparse.ArgumentTypeError(f"{text}: must be key=value of a long option of sbatch{more}")
    return key.replace("_", "-"), value if equals else True


def add_slurm_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("SLURM job", "one task per GPU; --device cpu asks for no GPUs")
    add = group.add_argument
    add("--nodes", type=whole(1), default=2, help="number of nodes")
    add("--ngpus", type=whole(1), default=8, help="tasks, and GPUs, per node")
    add("--timeout", type=minutes, default=4320, help="time limit: minutes, or as SLURM has it, 3-00:00:00")
    folder_help = "folder shared by all nodes, for logs and, if no --output_dir, results; %%j: job"
    add("--job_dir", default="", help=folder_help)
    add("--cpus_per_task", type=whole(1), default=10, help="cores per task")
    add("--mem_gb", type=positive, default=None, help="memory per node in GB")
    add_bool(group, "--use_volta32", False, "ask for GPUs of 32 GB, as --constraint volta32gb")
    for name, text in OPTIONS.items():
        add(f"--{name}", default=None, help=text)
    sbatch_help = "any other option of sbatch; KEY= takes one away; repeatable"
    add("--sbatch", type=option, action="append", default=[], metavar="KEY=VALUE", help=sbatch_help)
    add("--signal_delay", type=whole(1, 65535), default=120, help="seconds from the signal to the end of the limit")
    add("--max_requeues", type=whole(0), default=100, help="how often a job that timed out is requeued")
    add("--setup", action="append", default=[], help="shell line to run before the job; repeatable")
    add_bool(group, "--local", False, "run on this machine through submitit's local executor")
    add_bool(group, "--dry_run", False, "print the sbatch script and submit nothing")


class Trainer:
    """What submitit runs on every task: sets up torch.distributed's environment and calls a script's main(args)."""

    def __init__(self, script: str, args):
        self.script, self.args = script, args

    def __call__(self) -> int:
        """The exit code, under the local executor; under SLURM the process ends with it."""
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # of an earlier attempt that crashed
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        for name in PLACES:
            if value := getattr(self.args, name, None):
                setattr(self.args, name, value.replace("%j", str(environment.job_id)))
        local = environment.cluster == "local"
        if local:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would pass over it
        try:
            run_cli(lambda: importlib.import_module(self.script).main(self.args))
        except SystemExit as end:
            if not local or end.code == LOCAL_REQUEUE_RETURN_CODE:
                raise
            return int(end.code or 0)
        return 0

    def checkpoint(self) -> DelayedSubmission:
        """Requeue: main has written its state by now, and finds it again in output_dir."""
        return DelayedSubmission(self)


def check_folders(args) -> None:
    """See that folders have names that will be filled in, and no run uses them. Raises UsageError."""
    refuse(not args.job_dir, "--job_dir: give a folder on a file system that all nodes share; %j in it is the job id")
    for name in PLACES:
        path = getattr(args, name, None) or ""
        for unknown in re.findall("%(?!j)[^/]?", path):
            raise UsageError(f"--{name} {path}: {unknown} is not filled in, only %j is, with the job id")
    if os.path.isdir(output_dir := args.output_dir or args.job_dir):
        with OutputLock(output_dir):
            pass


def check_data(args) -> None:
    """See that files are there which the job will read. Raises UsageError."""
    if args.data_set not in FOLDERS:
        return
    args.train_list or args.eval_list or data_path(args)
    for name in ("data_path", "eval_data_path", "train_list", "eval_list"):
        path = getattr(args, name)
        absent = path and not os.path.exists(path) and not glob.glob(path) and path not in " ".join(args.setup)
        nodes = f"where only the nodes have it, --setup 'ls {path}' says so"
        refuse(absent, f"--{name} {path}: no such file or folder here; {nodes}")


def make_absolute(args) -> None:
    """Name from the root what is relative to the folder of the submission: --setup, say, may lead the job elsewhere."""
    for name in (*PLACES, *INPUTS, "initial_checkpoint"):
        path = getattr(args, name, None) or ""
        is_data = name.endswith("data_path") and (os.path.exists(path) or glob.glob(path))
        if path and (name in PLACES or is_data or os.path.isfile(path)):
            setattr(args, name, os.path.abspath(path))


def sbatch_script(args, name: str) -> str:
    """The script for sbatch: options, --setup, and submitit's command under srun."""
    paths = JobPaths(args.job_dir)
    given = {name.replace("_", "-"): value for name in OPTIONS if (value := getattr(args, name))} | dict(args.sbatch)
    options = {
        "job-name": name,
        "nodes": args.nodes,
        "ntasks-per-node": args.ngpus,
        "gpus-per-node": 0 if args.device == "cpu" or any(re.match("gres$|gpus", key) for key in given) else args.ngpus,
        "cpus-per-task": args.cpus_per_task,
        "time": args.timeout,
        "mem": args.mem_gb and f"{round(args.mem_gb * 1024)}M",
        "constraint": "volta32gb" if args.use_volta32 else None,
        "signal": f"USR2@{args.signal_delay}",
        "requeue": True,
        "open-mode": "append",
        "output": str(paths.stdout).replace("%t", "0"),
        "error": str(paths.stderr).replace("%t", "0"),
        **given,
    }
    lines = [f"#SBATCH --{k}" + ("" if v is True else f"={shlex.quote(str(v))}") for k, v in options.items() if v]
    # where one task dies, the others would wait for it in a collective until the time limit
    srun = ["srun", "--export=ALL", "--unbuffered", "--kill-on-bad-exit=1"]
    srun += ["--output", str(paths.stdout), "--error", str(paths.stderr)]
    if options["cpus-per-task"]:
        srun.append(f"--cpus-per-task={options['cpus-per-task']}")  # which srun no longer takes from sbatch
    command = f"{shlex.join(srun)} {PYTHON} {shlex.quote(args.job_dir)}"
    return "\n".join(["#!/bin/bash", *lines, *args.setup, "export SUBMITIT_EXECUTOR=slurm", command, ""])


def submit(script: str, trainer: Trainer, args) -> JobPaths:
    """Hand a script to sbatch; where the job's files are. Raises UsageError with sbatch's words, leaving nothing."""
    refuse(not shutil.which("sbatch"), "no SLURM here (no sbatch); --local true runs on this machine")
    kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(INHERITED)}
    done = subprocess.run(["sbatch"], input=script, env=kept, capture_output=True, text=True)
    number = re.search(r"job (\d+)", done.stdout)
    if done.returncode or not number:
        words = " ".join(re.sub("sbatch: (error: )?", "", done.stderr or done.stdout).split())
        flags = (flag for word, flag in HINTS.items() if re.search(word, words.lower()))
        raise UsageError(f"sbatch: {words}; change {next(flags, '--sbatch KEY=VALUE')}")
    paths = JobPaths(args.job_dir, number[1])
    paths.folder.mkdir(parents=True, exist_ok=True)
    paths.submission_file.write_text(script)
    submission = DelayedSubmission(trainer)
    submission.set_timeout(args.timeout, args.max_requeues)
    submission.dump(paths.submitted_pickle)  # for which the job waits a minute
    return paths


def start_here(trainer: Trainer, args) -> submitit.Job:
    """Start the tasks on this machine."""
    refuse(args.nodes > 1, f"--nodes {args.nodes}: --local true has one machine, give --nodes 1")
    executor = submitit.LocalExecutor(args.job_dir, python=PYTHON)
    tasks = {"tasks_per_node": args.ngpus, "gpus_per_node": 0 if args.device == "cpu" else args.ngpus}
    executor.update_parameters(**tasks, timeout_min=args.timeout, signal_delay_s=args.signal_delay)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # by submitit's process, which would kill the tasks
    job = executor.submit(trainer)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return job


def wait_for(job: submitit.Job) -> None:
    """End with the exit code of the first task that failed, and its last words."""
    try:
        job.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process tells the tasks, which save
        job.wait()
        raise
    try:
        codes = job.results()
    except submitit.core.utils.UncompletedJobError as error:
        killed = "a task was killed, for want of memory, say"
        raise UsageError(f"job {job.job_id}: {killed}; see {job.paths.folder}") from error
    for rank, code in enumerate(codes):
        if code:
            print(*(job.task(rank).stderr() or "").splitlines()[-1:], file=sys.stderr)
            sys.exit(code)


def launch(script: ModuleType) -> None:
    """Parse a script's flags and the cluster's, and submit its main as a job."""
    parser = script.get_args_parser()
    add_slurm_arguments(parser)
    args = parser.parse_args()
    script.check_args(args)
    early = f"--signal_delay {args.signal_delay}: must be a minute less than --timeout {args.timeout} min"
    refuse(args.timeout * 60 <= args.signal_delay + 60, early)
    if not args.dry_run:
        check_data(args)
        check_folders(args)
    make_absolute(args)
    text = sbatch_script(args, script.__name__.removeprefix("main_"))
    if args.dry_run:
        print(text, end="")
        return
    args.output_dir = args.output_dir or args.job_dir
    trainer, job_dir = Trainer(script.__name__, args), Path(args.job_dir)
    certain = next(path for path in (job_dir, *job_dir.parents) if "%j" not in str(path))
    with prepared_output_dir(str(certain), "--job_dir"):
        job = start_here(trainer, args) if args.local else None
        paths = job.paths if job else submit(text, trainer, args)
    results = args.output_dir.replace("%j", str(paths.job_id))
    print(f"submitted job {paths.job_id}: logs in {paths.folder}, results in {results}", flush=True)
    if job:
        wait_for(job)
