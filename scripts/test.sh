#!/usr/bin/env bash
# The README's test command: a new virtual environment, then every test.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 -m venv .venv
.venv/bin/pip install -q -c requirements/cpu.txt -e '.[dev]'
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -q -n 2
