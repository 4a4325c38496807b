#!/usr/bin/env bash
# Everything that is to be measured on a machine with an NVIDIA GPU, Python 3.12 and torch, but without TVM and without
# a package index. Run it in the repository's root:
#
#   benchmarks/gpu_device.sh SET.tar.xz [SECONDS] [ARGUMENTS OF benchmarks.gpu...]
#   benchmarks/gpu_device.sh --compiler PART...                unpack the packed compiler, for calls that follow
#   benchmarks/gpu_device.sh --dry SET.tar.xz                  say what would run
#
# SET.tar.xz is made where TVM is: python -m benchmarks.gpu_pack DIR --models all --archive SET.tar.xz. Results go into
# $OUT, or ./out-gpu where that is not set: a table (.md), all figures (.json), a plot, and records for backends/records.
# Without TVM the models' weights are drawn, and candidates are those of the set. With the packed compiler (parts made by
# python -m benchmarks.gpu_pack_compiler DIR) models are compiled here, their regions measured, their outputs compared.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${RESCOMPILE_WORK:-/tmp/rescompile-gpu}
out=${OUT:-$PWD/out-gpu}
mkdir -p "$work" "$out"

if [ "${1:-}" = --compiler ]; then
  shift
  # The parts of one archive, over one call or several: it is unpacked as soon as the last one is there.
  cp "$@" "$work/"
  count=$(sed -n 's/^parts //p' "$work"/compiler.txt)
  if [ "$(ls "$work"/compiler.tar.xz.* | wc -l)" -eq "$count" ]; then
    cat "$work"/compiler.tar.xz.* | tar -xJf - -C "$work"
    PYTHONPATH="$work/site" python3 -c 'import tvm; print("TVM", tvm.__version__, "is ready")'
  else
    echo "$(ls "$work"/compiler.tar.xz.* | wc -l) of $count parts are here"
  fi
  exit
fi

dry=()
if [ "${1:-}" = --dry ]; then dry=(--dry); shift; fi
set_archive=${1:?name the set: benchmarks/gpu_device.sh SET.tar.xz}
seconds=${2:-570}
shift $(($# > 1 ? 2 : 1))

if [ ! -f "$work/set/set.json" ] || [ "$set_archive" -nt "$work/set/set.json" ]; then
  rm -rf "$work/set"
  tar -xJf "$set_archive" -C "$work"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -d "$work/site/tvm/relax" ] && export PYTHONPATH="$PYTHONPATH:$work/site"

results=$work/results
mkdir -p "$results"
python3 -m benchmarks.gpu --set "$work/set" --out "$results" --seconds "$seconds" "${dry[@]}" "$@" 2>&1 | tee "$out/gpu.log"
# A command may bring back few files: the finished ones, not the lines of every stage.
find "$results" -maxdepth 1 \( -name 'gpu-*' -o -name 'records-*' \) -exec cp {} "$out/" \;
ls -l "$out"
