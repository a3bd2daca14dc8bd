#!/usr/bin/env bash
# Fills .whl/ with what a machine with a GPU and no network lacks: Python 3.12, CUDA, torch >= 2.11, Triton, lightning,
# accelerate, peft, pyarrow, tokenizers, attrs and pytest are there; the versions are those of constraints.txt.
#
#     bash benchmarks/gpu_wheels.sh [PYTHON]      # needs a package index; some 25 MB, of 64 MiB that travel
#
# There, `benchmarks/gpu.sh` installs them into a folder of its own, without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
mkdir -p .whl && rm -f .whl/*.whl
platforms=()
for name in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$name")
done
# transformers is newer than what is there; pydantic, hjson, annotated-types and typing-inspection are DeepSpeed's.
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest .whl --constraint constraints.txt \
    transformers regex httpx httpx2 httpcore2 truststore idna h11 attrs cattrs typing_extensions datasets dill \
    multiprocess xxhash tensorboard tensorboard-data-server pydantic pydantic_core annotated-types typing-inspection \
    trl liger-kernel hjson
# DeepSpeed comes as source; its kernels are compiled where they are used, which posttrain does not.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .whl \
    --constraint constraints.txt deepspeed
size=$(du -sk .whl | cut -f1)
tree=$(git ls-files --cached --others --exclude-standard -z | xargs -0 du -ck | tail -1 | cut -f1)
echo "$(ls .whl | wc -l) wheels of $((size / 1024)) MiB, beside a tree of $((tree / 1024)) MiB"
[ $((size + tree)) -lt $((60 * 1024)) ] || { echo "together they are more than travels (64 MiB)" >&2; exit 1; }
