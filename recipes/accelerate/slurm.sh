#!/usr/bin/env bash
# Several machines under SLURM: sbatch --nodes 2 recipes/accelerate/slurm.sh CONFIG.yaml [key=value ...]
#
# Starts torchrun once on each machine, which starts one process on each of its GPUs; all connect to the first machine.
# Submit it from the checkout. The checkout and train.output_dir must be on a disk that all machines can read.
# Set up the environment first: ./launch.sh setup. Not run on a SLURM cluster; the tests run its torchrun line on a
# stand-in for srun.
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120   # two minutes before the time is up the state is saved; submit it again to go on
set -euo pipefail

per_node=${SLURM_GPUS_PER_NODE:-8}
per_node=${per_node##*:}   # a100:8 is 8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export FINETUNE_NUM_PROCESSES=$((SLURM_NNODES * per_node))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it from sbatch by itself

exec srun "${FINETUNE_VENV:-.venv}/bin/python" -P -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$per_node" \
  --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  recipes/train.py "$@"
