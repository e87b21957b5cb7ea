"""Submit main_finetune.py to SLURM; its flags, and those of the job.

python submitit_finetune.py @recipes/finetune_base.args --nodes 8 --ngpus 8 --job_dir /shared/runs/%j --data_path /data
"""

import main_finetune
from utils.errors import run_cli
from utils.slurm import launch

if __name__ == "__main__":
    run_cli(lambda: launch(main_finetune))
