#!/usr/bin/env bash
# One command for a GPU machine without network: install, GPU tests, goals, benchmark. Under 10 minutes.
#   benchmarks/gpu.sh FOLDER               tables and logs go to FOLDER
#   benchmarks/gpu.sh FOLDER throughput    the same install, then tokens a second of a sweep alone, contexts in batches
#                                          and along shared prefixes; under 5 minutes
# Needs Python with torch (CUDA), triton, transformers, pybind11 and pytest installed.
set -euo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

rm -rf build
PIP_NO_INDEX=1 "$python" -m pip install --quiet --no-deps --no-build-isolation . 2>&1 | tee "$out/install.txt"
# -P: what was installed is tested, not the sources beside it, which have no built extension.
"$python" -P -m refinelens.cli doctor | tee "$out/doctor.txt"

if [ "${2:-}" = throughput ]; then
    for reuse in off on; do
        timeout 130 "$python" -P benchmarks/throughput.py --questions 16 --documents 10 --reuse-prefix "$reuse" 2>&1 |
            tee "$out/throughput-$reuse.txt"
    done
    exit
fi

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)  # most of the time compiles kernels
status=0
timeout 180 "$python" -P -m pytest -q -p no:cacheprovider ${parallel[@]+"${parallel[@]}"} tests/op tests/kernels/test_lens_*.py \
    tests/kernels/test_whole_program_gpu.py tests/model/test_families.py tests/layers/test_layers.py tests/sweeping/test_sweep.py -rs -s \
    2>&1 | tee "$out/tests.txt" || status=$?
timeout 180 "$python" benchmarks/gpu_goals.py 2>&1 | tee "$out/goals.md" || status=$?
for positions in 1024 16384; do
    timeout 60 "$python" benchmarks/translators.py --positions "$positions" 2>&1 | tee -a "$out/translators.txt" || status=$?
done
timeout 200 "$python" benchmarks/fused_lens.py 2>&1 | tee "$out/bench.txt" || status=$?
exit "$status"
