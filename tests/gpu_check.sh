#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes: build, GPU tests, a search for races,
# sanitizers on a subset, benchmarks. Needs no network: a python3 with torch (CUDA), triton, pybind11, ninja, pytest; nvcc.
#
#   tests/gpu_check.sh PYTHON OUT
#
# OUT receives: build.log, tune.log, tests.log, race.log, sanitizer-*.log, bench.log, proven.json, wisdom.json, parity.csv,
# results-<machine>.tar.gz
# A step that fails does not stop the others; the exit code tells.
set -uo pipefail
python=$(command -v "$1")
out=$2
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$PWD/build/gpu-site
failed=()
deadline=530  # seconds for everything

# step NAME SECONDS COMMAND...: run it into NAME.log, within its share of the time.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -le 5 ]; then echo "$name: no time left"; failed+=("$name"); return; fi
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed+=("$name")
  echo "$name: exit $status after $((SECONDS - start)) s"
  tail -n 12 "$out/$name.log" | sed 's/^/    /'
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
export BIGKERN_CUDA=1 XDG_CACHE_HOME=$out/cache PYTHONUNBUFFERED=1
rm -rf "$site"
step build 200 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" .
export PYTHONPATH=$site
cd build  # what is imported must be what was built

# The emulator's own tests on the real thing: do the fragment layouts that it believes in hold?
layouts() {
  nvcc -std=c++17 -I../csrc -I../tests/cpp -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80 \
    -x cu ../tests/cpp/test_simt.cpp ../tests/cpp/main.cpp -o layouts && ./layouts
}
export -f layouts
step layouts 60 bash -c layouts
step tune 360 "$python" -m bigkern tune --seconds 150 --export "$out/wisdom.json"
cp "$out/cache/bigkern/proven.json" "$out/" 2>/dev/null
step tests 200 "$python" -m pytest ../tests -q -p no:cacheprovider -k "not simt and not train and not gate"
"$python" ../tests/parity_table.py >"$out/parity.txt" 2>&1 && cp ../build/parity.csv "$out/"
step race 60 "$python" ../tests/gpu_race.py 1000
for tool in memcheck racecheck; do
  step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" ../tests/gpu_sanitized.py
done
step bench 150 "$python" -m bigkern bench --quick --out "$out/results"

[ ${#failed[@]} -eq 0 ] && echo "gpu-check: passed" && exit 0
echo "gpu-check: failed: ${failed[*]}"
exit 1
