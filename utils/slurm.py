"""Everything submitit: the cluster's flags, the submission, and the callable that runs on every task."""

import importlib
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from .args import ArgumentParser, add_bool
from .errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def add_slurm_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("SLURM job", "one task per GPU; --device cpu asks for no GPUs")
    group.add_argument("--nodes", type=int, default=2, help="number of nodes")
    group.add_argument("--ngpus", type=int, default=8, help="tasks, and GPUs, per node")
    group.add_argument("--timeout", type=int, default=4320, help="time limit in minutes")
    group.add_argument(
        "--job_dir", default="", help="folder shared by all nodes, for logs and, if no --output_dir, results; %%j: job"
    )
    group.add_argument("--partition", default=None, help="partition to submit to")
    group.add_argument("--cpus_per_task", type=int, default=10, help="cores per task")
    group.add_argument("--mem_gb", type=float, default=None, help="memory per node in GB")
    group.add_argument("--constraint", default=None, help="features the nodes must have")
    add_bool(group, "--use_volta32", False, "ask for GPUs of 32 GB, as --constraint volta32gb")
    group.add_argument("--account", default=None, help="account to charge")
    group.add_argument("--qos", default=None, help="quality of service")
    group.add_argument("--comment", default=None, help="comment for the scheduler")
    group.add_argument("--signal_delay", type=int, default=120, help="seconds from the signal to the end of the limit")
    group.add_argument("--max_requeues", type=int, default=100, help="how often a job that timed out is requeued")
    group.add_argument("--setup", action="append", default=None, help="shell line to run before the job; repeatable")
    add_bool(group, "--local", False, "run on this machine through submitit's local executor")
    add_bool(group, "--dry_run", False, "print the sbatch script and submit nothing")


class Trainer:
    """What submitit runs on every task: sets up torch.distributed's environment and calls a script's main(args)."""

    def __init__(self, script: str, args):
        self.script, self.args = script, args

    def __call__(self) -> None:
        environment = submitit.JobEnvironment()
        # the crash of an earlier attempt must not be taken for the result of this one
        environment.paths.result_pickle.unlink(missing_ok=True)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        for name in ("job_dir", "output_dir", "log_dir"):
            if value := getattr(self.args, name):
                setattr(self.args, name, value.replace("%j", str(environment.job_id)))
        importlib.import_module(self.script).main(self.args)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Requeue: main has written its state by now, and finds it again in output_dir."""
        return submitit.helpers.DelayedSubmission(Trainer(self.script, self.args))


def check_job_dir(job_dir: str) -> None:
    """Create the part of job_dir that does not depend on the job and see that it can be written."""
    if not job_dir:
        raise UsageError("--job_dir: give a folder on a file system that all nodes share; %j in it is the job id")
    folder = next(path for path in (Path(job_dir), *Path(job_dir).parents) if "%j" not in str(path)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--job_dir {job_dir}: {folder} cannot be written ({error.strerror})") from error


def slurm_parameters(args, name: str) -> dict:
    """submitit's parameters for the flags of `add_slurm_arguments`."""
    constraint = "volta32gb" if args.use_volta32 and not args.constraint else args.constraint
    slurm = {
        "slurm_partition": args.partition,
        "slurm_constraint": constraint,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_comment": args.comment,
    }
    return {
        "name": name,
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": 0 if args.device == "cpu" else args.ngpus,
        "cpus_per_task": args.cpus_per_task,
        "timeout_min": args.timeout,
        "slurm_signal_delay_s": args.signal_delay,
        # where one task dies, the others would wait for it in a collective until the time limit
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_additional_parameters": {"requeue": True},
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH", *(args.setup or [])],
        **({"mem_gb": args.mem_gb} if args.mem_gb else {}),
        **{key: value for key, value in slurm.items() if value},
    }


def launch(script: ModuleType) -> None:
    """Parse a script's flags and the cluster's, and submit its main as a job."""
    parser = script.get_args_parser()
    add_slurm_arguments(parser)
    args = parser.parse_args()
    script.check_args(args)
    for name in ("nodes", "ngpus", "timeout", "cpus_per_task"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.timeout * 60 <= args.signal_delay + 60:
        raise UsageError(f"--signal_delay {args.signal_delay}: must be a minute less than --timeout {args.timeout} min")
    name = script.__name__.removeprefix("main_")
    if args.dry_run:
        print(sbatch_script(args, name))
        return
    check_job_dir(args.job_dir)
    args.output_dir = args.output_dir or args.job_dir
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    cluster = "local" if args.local else "slurm"
    try:
        executor = submitit.AutoExecutor(args.job_dir, cluster=cluster, slurm_max_num_timeout=args.max_requeues)
    except RuntimeError as error:
        raise UsageError(f"no SLURM here ({error}); --local true runs on this machine") from error
    parameters = slurm_parameters(args, name)
    if args.local:
        parameters = {k: v for k, v in parameters.items() if not k.startswith("slurm_")}
    executor.update_parameters(**parameters)
    job = executor.submit(Trainer(script.__name__, args))
    print(f"submitted job {job.job_id}: logs in {job.paths.folder}, results in {args.output_dir}", flush=True)
    if args.local:
        job.results()


def sbatch_script(args, name: str) -> str:
    """The script that would be submitted."""
    parameters = slurm_parameters(args, name)
    renamed = {"name": "job_name", "tasks_per_node": "ntasks_per_node", "timeout_min": "time"}
    words = {renamed.get(k, k.removeprefix("slurm_")): v for k, v in parameters.items() if v}
    if "mem_gb" in words:
        words["mem"] = f"{words.pop('mem_gb'):g}GB"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(args.job_dir)}"
    return _make_sbatch_string(command=command, folder=args.job_dir, **words)
