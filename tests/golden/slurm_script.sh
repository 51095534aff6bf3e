#!/bin/bash
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --qos=high

# One torchrun for each node. All nodes see this directory, the shard set, the run directory and
# this Python at the same paths. SLURM signals this script 600 s before the time limit; it
# passes that on, the ranks finish their step and save, and the job goes back into the queue, where
# the next start goes on. scancel ends it for good.
set -uo pipefail
cd -- /home/user || exit 1
export NCCL_SOCKET_IFNAME=eth0

run=run
logs="$run/logs/$SLURM_JOB_ID"
mkdir -p -- "$logs" || exit 1
: > "$logs/started"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

ranks=
cancelled=
pass_on() { [ -z "$ranks" ] || kill -USR1 "$ranks" 2> /dev/null; }
trap pass_on USR1
trap 'cancelled=yes; pass_on' TERM

# each task learns from SLURM which node it is: the first one hosts the rendezvous
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpu-bind=none --wait=600 --open-mode=append --output="$logs/node-%n.log" \
    bash -c '
        exec "${@:1:4}" --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
            --local-addr "$SLURMD_NODENAME" "${@:5}"
    ' node /opt/venv/bin/python -P -m torch.distributed.run \
    --nnodes 2 \
    --nproc-per-node 1 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout 600 \
    --no-python /opt/venv/bin/sft-train \
    --under-launcher \
    --shards set \
    --recipe tiny.toml \
    --output run \
    --set run.seed=3 &
ranks=$!
echo "started on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}; logs: $logs/node-*.log"
while true; do
    wait "$ranks"  # a trapped signal ends the wait, not the ranks
    kill -0 "$ranks" 2> /dev/null || break
done

/opt/venv/bin/sft-train status --changed-after "$logs/started" --wait 60 -- "$run"
outcome=$?
if [ "$outcome" -eq 75 ] && [ -z "$cancelled" ]; then
    scontrol requeue "$SLURM_JOB_ID" && echo "job $SLURM_JOB_ID is in the queue again"
fi
exit "$outcome"
