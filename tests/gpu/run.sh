#!/usr/bin/env bash
# Everything that needs a GPU, offline, in about ten minutes on 16 cores: tests/gpu/run.sh OUT [stage ...]
# Stages: environment build tests_cuda memcheck racecheck synccheck compile tests_triton attention tokens models training compiled (default: all).
# --dry-run: the scripts themselves, on a CPU with tiny shapes.
# Needs nvcc, torch 2.11 or newer, triton, timm, pytest, ninja and pybind11 under $PYTHON (default python3); installs nothing.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"
