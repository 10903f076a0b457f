#!/bin/bash
# sbatch slurm-example.sh: one launcher on each machine; saves before the time is up, and goes on in the next job.
#SBATCH --job-name=asgo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 20000))"

# Single quotes: SLURM_NODEID is each machine's own.
srun bash -c 'exec asgo train gpt --optimizer accasro --out /shared/runs/accasro --resume \
    --gpus "$SLURM_GPUS_ON_NODE" --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rendezvous "$RENDEZVOUS"'
code=$?

# 75: interrupted, and saved. Whatever else it is, another attempt would not mend it.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
