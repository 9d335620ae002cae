#!/usr/bin/env bash
# Train on all GPUs of one machine (or N processes):   launch/torchrun.sh CONFIG [bigtrain train options]
# Several machines: start it on each with NNODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
GRACE=${GRACE:-300} # seconds a rank may take to save after a signal; torchrun's default of 30 kills slow saves

rendezvous=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

# Without --signals-to-handle torchrun dies of USR1 and never tells its workers.
exec python -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout "$GRACE" \
  -m bigtrain train "$@"
