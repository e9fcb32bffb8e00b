#!/usr/bin/env bash
# From raw text to a model that answers: every step is a slmjax command that can be run by itself.
# `make quickstart` installs slmjax and runs this.
set -euo pipefail

step() {
  printf '\n+ %s\n' "$*"
  "$@"
}

step slmjax data configs/quickstart_data.gin
step slmjax data configs/quickstart_instruct_data.gin
step slmjax train configs/quickstart.gin
step slmjax train configs/quickstart_instruct.gin
step slmjax eval configs/quickstart.gin --baselines runs/quickstart/data
step slmjax eval configs/quickstart_instruct.gin
step slmjax sample configs/quickstart.gin --prompt 'def read_lines(path):'
step slmjax sample configs/quickstart_instruct.gin --instruct --prompt 'Write a Python function.
def add(a, b):
Return the sum of a and b.' --prompt 'Write a Python function.
def is_empty(self):
Return True if the queue is empty, False otherwise.'
step slmjax report runs/quickstart/base runs/quickstart/instruct --output runs/quickstart/report.html \
  --data runs/quickstart/data --data runs/quickstart/instruct_data
