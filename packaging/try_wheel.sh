#!/bin/sh
# Tries a wheel as a new user would: packaging/try_wheel.sh WHEEL [PYTHON [TORCH]]
# In a fresh virtual environment, outside the checkout, with no cache and no hub: install, `userip env`,
# `userip demo`. Prints what was used, wall time and lines printed.
set -eu
wheel=$(realpath "$1") python=${2:-python3} torch=${3:-torch==2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH
export USERIP_FAST_CACHE="$work/cache" HF_HUB_OFFLINE=1
"$python" -m venv venv
venv/bin/python -m pip install -q "$torch"
venv/bin/python -m pip install -q "$wheel"
venv/bin/python -c 'import torch, userip_fast as uf, userip_fast.core._extension as e; import platform
print("Python", platform.python_version(), "torch", torch.__version__, "userip_fast", uf.__version__)
assert e.why_not() is None, e.why_not()'
venv/bin/userip env > env.txt
began=$(date +%s)
venv/bin/userip demo --out demo > demo.txt 2>&1 || { cat demo.txt >&2; exit 1; }
grep -q 'posterior E-step' demo.txt
test -s demo/report.html
echo "$(basename "$wheel"): userip demo took $(($(date +%s) - began)) s, printed $(wc -l < demo.txt) lines"
