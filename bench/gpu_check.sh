#!/bin/sh
# Everything that wants a card, in steps of under ten minutes each. Nothing is downloaded. From the repository's root:
#   bench/gpu_check.sh build      the Python module and the benchmarks for the card that is there, in build-gpu/
#   bench/gpu_check.sh test       the tests of operations and models on the card
#   bench/gpu_check.sh sanitize   compute-sanitizer's four tools over prompts and decode steps of a small model
#   bench/gpu_check.sh bench      prompt and decode speed of random 20b and 120b models, a JSON line a row, to bench/results/
#   bench/gpu_check.sh profile    where the time of a decode step goes
set -eu
cd "$(dirname "$0")/.."
out=build-gpu
bench=$out/bench_forward

build() {
  cmake -S . -B $out -G Ninja -DGPTOSS_CUDA=ON -DGPTOSS_CUDA_ARCHITECTURES=native -DGPTOSS_BENCH=ON \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)"
  cmake --build $out > $out/build.log 2>&1 || { cat $out/build.log; exit 1; }
  grep -E "Compiling entry function|bytes stack|Used .* registers" $out/build.log | tee $out/cuda_resources.txt
  mkdir -p $out/python
  cp -r python/gptoss $out/python/
  cp $out/_gptoss*.so $out/python/gptoss/
}

tests() {
  PYTHONPATH=$out/python GPTOSS_TEST_DEVICE=cuda python3 -m pytest -q -x -p no:cacheprovider tests/test_ops.py tests/test_mxfp4.py \
    tests/test_model.py tests/test_sample_op.py tests/test_cuda.py
}

sanitize() {
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool $tool --error-exitcode 1 $bench --shape tiny --device cuda --prompt 300 --repeats 1 --decode 3 \
      --context 0,300 --batch 1,9
  done
}

bench() {
  mkdir -p bench/results
  for shape in 20b 120b; do
    $bench --shape $shape --device cuda --prompt 512,2048,8192 --step 2048 --decode 64 --context 0,4096,32768 --batch 1 --json
    $bench --shape $shape --device cuda --prompt 0 --decode 16 --context 1024 --batch 8,64,256 --json
  done | tee "bench/results/cuda.jsonl"
}

profile() {
  nsys profile -o $out/decode --force-overwrite true --stats true $bench --shape 20b --device cuda --prompt 0 --decode 64
}

case "${1:-}" in
  build) build ;;
  test) tests ;;
  sanitize) sanitize ;;
  bench) bench ;;
  profile) profile ;;
  *) sed -n '2,8s/^# //p' "$0"; exit 2 ;;
esac
