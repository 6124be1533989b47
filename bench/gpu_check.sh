#!/bin/bash
# Everything that wants a card, in steps of under ten minutes each; nothing is downloaded. From the repository's root:
#   bench/gpu_check.sh build       the Python module and the benchmarks for the card that is there, in build-gpu/
#   bench/gpu_check.sh test        all tests of operations, models and generation, on the card
#   bench/gpu_check.sh sanitize    compute-sanitizer's four tools over every operation, and over steps of a small model
#   bench/gpu_check.sh bench       20b: every operation; prompts, decode, batches. JSON lines in bench/results/
#   bench/gpu_check.sh bench120    the same for 120b
#   bench/gpu_check.sh profile     time and bandwidth of each kernel of a decode step and of a prompt, by Nsight Compute
# RESULTS=FOLDER writes the rows elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build-gpu
results=${RESULTS:-bench/results}
forward=$out/bench_forward
ops=$out/bench_ops_cuda

build() {
  cmake -S . -B $out -G Ninja -DGPTOSS_CUDA=AUTO -DGPTOSS_BENCH=ON -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)"
  cmake --build $out > $out/build.log 2>&1 || { cat $out/build.log; exit 1; }
  test -x $ops || { echo "built without CUDA"; exit 1; }
  grep -E "Compiling entry function|bytes stack|Used .* registers" $out/build.log > $out/cuda_resources.txt || true
  grep -B 1 -E "[1-9][0-9]* bytes spill" $out/cuda_resources.txt || echo "no kernel spills"
  rm -rf $out/python
  mkdir -p $out/python
  cp -r python/gptoss $out/python/
  rm -f $out/python/gptoss/_gptoss*.so
  cp $out/_gptoss*.so $out/python/gptoss/
}

# A few processes share the card: a test mostly waits for launches and for the reference on the CPU. Not more, for a small
# model with the default limits takes some 35 GiB of cache.
tests() {
  jobs=$(python3 -c "import xdist" 2> /dev/null && echo "-n 3" || true)
  PYTHONPATH=$out/python GPTOSS_TEST_DEVICE=cuda python3 -m pytest -q --maxfail=20 -p no:cacheprovider $jobs tests/test_mxfp4.py \
    tests/test_ops.py tests/test_attention.py tests/test_fused.py tests/test_hopper.py tests/test_model.py tests/test_generate.py \
    tests/test_cuda.py tests/test_sample_op.py tests/test_drafts.py tests/test_prefix_cache.py "$@"
}

sanitize() {
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool $tool --error-exitcode 1 $ops --shape tiny --tokens 1,9,130 --context 0,300 --calls 1
    compute-sanitizer --tool $tool --error-exitcode 1 $forward --shape tiny --device cuda --prompt 300 --repeats 1 --decode 3 \
      --context 0,300 --batch 1,9
  done
}

rows() {
  mkdir -p "$results"
  {
    $ops --shape "$1" --context 0,4096 --json
    $forward --shape "$1" --device cuda --prompt 512,2048,8192 --step 2048 --decode 64 --context 0,4096,32768 --batch 1 --json
    $forward --shape "$1" --device cuda --prompt 0 --step 2048 --decode 16 --context 1024 --batch 8,64,256 --json
  } | tee "$results/cuda-$1.jsonl"
}

profile() {
  metrics=gpu__time_duration.sum,dram__bytes_read.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics=$metrics,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
  export GPTOSS_CUDA_GRAPHS=0
  for work in "--prompt 0 --decode 2" "--prompt 2048 --repeats 1 --decode 0"; do
    ncu --clock-control none --metrics $metrics --csv $forward --shape 20b --layers 2 --device cuda --step 2048 $work
  done | { grep -E '^"' || true; } | tee $out/profile.csv
}

case "${1:-}" in
  build) build ;;
  test) shift && tests "$@" ;;
  sanitize) sanitize ;;
  bench) rows 20b ;;
  bench120) rows 120b ;;
  profile) profile ;;
  *) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
esac
