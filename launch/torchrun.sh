#!/usr/bin/env bash
# Train on all GPUs of one machine (or N processes):   launch/torchrun.sh CONFIG [bigtrain train options]
# Several machines: start it on each with NNODES and MASTER_ADDR set. NNODES=2:4 begins with two to four of them and
# goes on with those that are left (or have come) when one dies.
set -euo pipefail

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
GRACE=${GRACE:-300}     # seconds a rank may take to save after a signal; torchrun's default of 30 kills slow saves
RESTARTS=${RESTARTS:-3} # when a rank dies all are started again and go on from the newest sound checkpoint

rendezvous=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${JOB:-bigtrain}")
  rendezvous+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
  # Else a host that comes later waits for ever for the address of rank 0: torch 2.13 tells it in the first round only.
  case "$NNODES" in *:*) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ;; esac
fi

# Without --signals-to-handle torchrun dies of USR1 and never tells its workers.
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout "$GRACE" \
  --max-restarts "$RESTARTS" -m bigtrain train "$@"
