#!/usr/bin/env bash
# GPT-2 on a Slurm cluster: a job that queues itself again at its time limit, after a preemption and after a failure.
#     sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 docs/slurm.sh --preset gpt2-xl
# Submit it from the repository, on a disk that all nodes see. What follows the script are flags of train_gpt2.py.
#SBATCH --job-name=gpt2
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM so many seconds before the time limit: a step and its checkpoint must fit (XL: 18.7 GB). Preempted jobs have
# the GraceTime of their partition instead, and after scontrol requeue the cluster's KillWait, 30 seconds by default.
#SBATCH --signal=TERM@300

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
    --max-restarts=3 --shutdown-timeout=270 train_gpt2.py --init_from resume "$@" && exit

# torchrun ends with 1 after a signal as after an error, and Slurm queues neither again. What fails in its first ten
# minutes would fail again, and what was queued 100 times may never end well.
((SECONDS > 600 && ${SLURM_RESTART_COUNT:-0} < 100)) && scontrol requeue "$SLURM_JOB_ID"
exit 1
