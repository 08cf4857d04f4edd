#!/usr/bin/env bash
# Try a built wheel under another torch, without CUDA's libraries: tools/try_torch.sh 2.10.0 dist/*-abi3-*.whl [pytest's arguments].
# PYTHON names another interpreter.
set -euo pipefail
version=$1 wheel=$(realpath "$2") root=$(cd "$(dirname "$0")/.." && pwd)
shift 2
python=${PYTHON:-python3}
venv=$root/build/torch-$version-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')

"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "torch==$version"
# what torch asks for, but for libraries of a GPU
"$venv/bin/python" -c '
import importlib.metadata, re
for name in importlib.metadata.requires("torch"):
    if not re.match("nvidia|cuda|triton", name) and "extra ==" not in name:
        print(name)' >"$venv/requirements.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-warn-conflicts -r "$venv/requirements.txt" \
  numpy pytest hypothesis  # the newest for this Python, which may be older than the one that others are pinned for
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheel"

python3 "$root/tools/standins.py" "$venv"/lib/python*/site-packages "$venv/standins"
export LD_LIBRARY_PATH=$venv/standins
unset PYTHONPATH
cd /  # away from the sources
"$venv/bin/python" "$root/tools/smoke.py"
"$venv/bin/pytest" -q -p no:cacheprovider "${@:-$root/python_tests/ops}"
