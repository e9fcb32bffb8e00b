#!/usr/bin/env bash
# Starts N processes of one run on this machine:
#
#   launch/local.sh N slmjax train configs/quickstart.gin
#
# Each line of output is prefixed with the rank that wrote it. SIGINT and SIGTERM go to every process. When one process
# fails, the others are ended, and its status is returned.
#
#   SLMJAX_PORT             port of process 0 (default: a random one)
#   SLMJAX_GRACE_SECONDS    how long the others may take to end after a failure before they are killed (default 30)
#   JAX_NUM_CPU_DEVICES     devices of each process on the CPU (JAX's own variable; default 1)
#   CUDA_VISIBLE_DEVICES    the GPUs to share out; where it is not set, all that nvidia-smi lists
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND [ARGUMENT...]" >&2
  exit 2
fi
num_processes=$1
shift

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    while IFS= read -r index; do gpus+=("$index"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
fi
if ((${#gpus[@]} % num_processes)); then
  echo "launch/local.sh: ${#gpus[@]} GPUs cannot be shared out evenly among $num_processes processes;" \
    "set CUDA_VISIBLE_DEVICES, or JAX_PLATFORMS=cpu" >&2
  exit 2
fi

export SLMJAX_COORDINATOR="localhost:${SLMJAX_PORT:-$((20000 + RANDOM % 20000))}"
export SLMJAX_NUM_PROCESSES=$num_processes

prefixed() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

set -m # a process group each: a signal reaches what a process started, and Ctrl-C reaches each process once
pids=()
readers=()
for ((rank = 0; rank < num_processes; rank++)); do
  exec 3> >(prefixed "$rank")
  readers+=($!)
  (
    export SLMJAX_PROCESS_ID=$rank
    share=$((${#gpus[@]} / num_processes))
    if ((share)); then
      CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:rank * share:share}")
      export CUDA_VISIBLE_DEVICES
    fi
    exec "$@"
  ) >&3 2>&1 3>&- </dev/null &
  pids+=($!)
  exec 3>&-
done

forward() {
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" -- "-$pid" 2>/dev/null; done
}
stopping=0 # asked to stop: each process takes the time that it needs to save
trap 'stopping=1; forward INT' INT
trap 'stopping=1; forward TERM' TERM

status=0
deadline=0
running=("${pids[@]}")
while ((${#running[@]})); do
  still=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=("$pid")
      continue
    fi
    wait "$pid" 2>/dev/null
    code=$?
    if ((code && !status)); then
      status=$code
      if ((!stopping)); then
        deadline=$((SECONDS + ${SLMJAX_GRACE_SECONDS:-30}))
        forward TERM
      fi
    fi
  done
  running=(${still[@]+"${still[@]}"})
  if ((deadline && SECONDS >= deadline)); then forward KILL; fi
  if ((${#running[@]})); then sleep 0.2; fi
done
for pid in "${readers[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
done
exit "$status"
