#!/usr/bin/env bash
# Train with Open MPI:   launch/mpirun.sh        (edit what is above the line of dashes)
# `bigtrain launch mpi CONFIG --hosts a:8,b:8` fills it in and starts it.
PYTHON=python
CONFIG=llama-1b
RUN=runs/llama-1b
OPTIONS=()
RESTARTS=3
RANKS=8
HOSTS=localhost:8
GRACE=300
# ----------------------------------------------------------------------------------------------------------------
# On a signal mpirun waits GRACE seconds for the ranks to save; its own default is 1 second.
set -uo pipefail
export MASTER_ADDR MASTER_PORT
first=${HOSTS%%[:,]*}
MASTER_ADDR=${MASTER_ADDR:-$([ "$first" = localhost ] && echo 127.0.0.1 || echo "$first")}
MASTER_PORT=${MASTER_PORT:-$((20000 + $$ % 20000))}

asked=
trap 'asked=1; kill -TERM "$mpirun" 2>/dev/null' TERM INT
trap 'asked=1; kill -USR1 "$mpirun" 2>/dev/null' USR1
trap 'asked=1; kill -USR2 "$mpirun" 2>/dev/null' USR2

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  [ "$attempt" -gt 0 ] && echo "$(date +%T) restart $attempt of $RESTARTS" && sleep 2
  mpirun -n "$RANKS" --host "$HOSTS" --bind-to none -x MASTER_ADDR -x MASTER_PORT \
    --prtemca odls_base_sigkill_timeout "$GRACE" \
    "$PYTHON" -m bigtrain train "$CONFIG" --run-dir "$RUN" ${OPTIONS[@]+"${OPTIONS[@]}"} &
  mpirun=$!
  wait "$mpirun"
  code=$?
  while kill -0 "$mpirun" 2>/dev/null; do # a signal ends `wait`, not mpirun
    wait "$mpirun"
    code=$?
  done
  case "$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$RUN/outcome.json" 2>/dev/null)" in
    done | preempted) exit 0 ;;
  esac
  [ -n "$asked" ] || [ "$code" -eq 2 ] && exit "$code"
  MASTER_PORT=$((MASTER_PORT + 1))
done
exit "$code"
