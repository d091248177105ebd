#!/usr/bin/env bash
# The README's first command: install, fetch the demo model, stream one answer.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install -q -c requirements/cpu.txt -e .
.venv/bin/octavo run smollm2:135m "${1:-Explain paged attention in one sentence.}"
