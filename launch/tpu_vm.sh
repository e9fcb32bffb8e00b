#!/usr/bin/env bash
# One run on one Cloud TPU VM slice, of one host or many:
#
#   launch/tpu_vm.sh create                                  make the slice
#   launch/tpu_vm.sh install                                 copy the committed source to every host, install it
#   launch/tpu_vm.sh run slmjax train configs/....gin ...    the same command on every host, as one run
#   launch/tpu_vm.sh delete                                  give the slice back: it costs money until then
#
# --dry-run before the verb prints the commands instead of running them. Needs the gcloud command, logged in.
#
#   TPU_NAME      name of the slice (default slmjax)
#   TPU_ZONE      zone (required), such as us-east5-b
#   TPU_TYPE      accelerator type (default v6e-8)
#   TPU_VERSION   runtime version (default v2-alpha-tpuv6e, the one of v6e)
#   TPU_PROJECT   project (default: gcloud's own)
#   TPU_SPOT      1 asks for preemptible capacity
set -euo pipefail

usage="usage: TPU_ZONE=ZONE launch/tpu_vm.sh [--dry-run] create|install|run COMMAND...|delete"
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
verb=${1:?$usage}
shift
name=${TPU_NAME:-slmjax}
where=(--zone "${TPU_ZONE:?$usage}")
if [[ -n ${TPU_PROJECT:-} ]]; then where+=(--project "$TPU_PROJECT"); fi
cd "$(dirname "$0")/.."

execute() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() {
  execute gcloud compute tpus tpu-vm "$@" "${where[@]}"
}

# The images carry an older Python than slmjax needs, so uv brings one. The source is unpacked over the one before: what
# runs wrote beside it stays.
# shellcheck disable=SC2016 # the hosts expand $HOME and $PYTHON
setup='set -e
mkdir -p slmjax && tar -xzf slmjax.tar.gz -C slmjax && cd slmjax
python3 -m pip install --quiet --user uv
python3 -m uv python install --quiet 3.12
PYTHON=$(python3 -m uv python find --managed-python 3.12) VENV=$HOME/.slmjax launch/install.sh tpu,data'

case $verb in
  create)
    options=(--accelerator-type "${TPU_TYPE:-v6e-8}" --version "${TPU_VERSION:-v2-alpha-tpuv6e}")
    if [[ ${TPU_SPOT:-} == 1 ]]; then options+=(--spot); fi
    tpu create "$name" "${options[@]}"
    ;;
  install)
    archive=$(mktemp -d)/slmjax.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    execute git archive --format tar.gz --output "$archive" HEAD
    tpu scp "$archive" "$name:slmjax.tar.gz" --worker all
    tpu ssh "$name" --worker all --command "$setup"
    ;;
  run)
    : "${1:?$usage}"
    printf -v command '%q ' "$@"
    # shellcheck disable=SC2016 # the hosts expand $HOME and $PATH
    tpu ssh "$name" --worker all \
      --command 'cd slmjax && export SLMJAX_DISTRIBUTED=auto PATH="$HOME/.slmjax/bin:$PATH" && '"exec $command"
    ;;
  delete)
    tpu delete "$name" --quiet
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
