#!/usr/bin/env bash
# Everything to run on a lent GPU in one call: tests, whole decode steps, kernels. Logs and JSON land in $OUT as they come
# (e2e_gpu.json, kernels_gpu_quick.json); copy them to benchmarks/results afterwards.
#   bash benchmarks/gpu_check.sh [tests] [e2e] [kernels]        (all three without arguments)
# Seconds for each: TESTS_S=80 E2E_S=130 KERNELS_S=95. E2E_FLAGS="" to compile transformers' static cache too.
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-/tmp/gpu_check} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton_cache}
mkdir -p "$OUT"
parts=${*:-tests e2e kernels}
began=$SECONDS
for part in $parts; do
  echo "== $part at $((SECONDS - began)) s"
  case $part in
    tests)
      workers=""
      python3 -c "import xdist" 2>/dev/null && workers="-n 8"
      timeout -s INT -k 8 "${TESTS_S:-80}" python3 -m pytest -q -p no:cacheprovider $workers --no-header \
        tests/kernels/test_step.py tests/engine/test_lean.py tests/engine/test_graph.py tests/engine/test_fused.py \
        tests/engine/test_steady.py tests/engine/test_paged.py \
        tests/models/test_devices.py tests/inspect/test_inspect_gpu.py tests/kernels 2>&1 | tee "$OUT/tests.log" | tail -40
      ;;
    e2e)
      timeout "${E2E_S:-130}" python3 benchmarks/e2e_gpu.py ${E2E_FLAGS---no-compile} --budget "${E2E_S:-130}" --out "$OUT" \
        2>&1 | tee "$OUT/e2e.log"
      ;;
    kernels)
      timeout "${KERNELS_S:-95}" python3 benchmarks/kernels_gpu.py --quick --out "$OUT" 2>&1 | tee "$OUT/kernels.log"
      ;;
    *) echo "unknown part $part; expected tests, e2e or kernels" ;;
  esac
done
echo "== done at $((SECONDS - began)) s"
ls -l "$OUT"
