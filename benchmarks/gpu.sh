#!/usr/bin/env bash
# All that is to be known of posttrain on a GPU, in one command of ten minutes: tests, speed beside a bare loop and TRL,
# methods, a profile. Everything goes to $OUT (out/gpu by default), a table comes last.
#
#     bash benchmarks/gpu_wheels.sh && bash benchmarks/gpu.sh      # the first where there is a network
#     bash benchmarks/gpu.sh --only tests sft                      # parts, or single measurements
#     PYTHON=.venv/bin/python bash benchmarks/gpu.sh --tiny        # the same code on a CPU, in small
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/out/gpu} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} # one rank, perhaps no network
export COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
if [ -z "${PYTHON:-}" ]; then # a machine without posttrain's packages: they came as wheels
    PYTHON=python3 site=${SITE:-/tmp/site}
    if [ ! -e "$site/made" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
        touch "$site/made"
    fi
    export PYTHONPATH="$site:$PWD"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
