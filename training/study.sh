#!/usr/bin/env bash
# The whole pre-training study, by the commands of training/study.py:
#
#     training/study.sh DEVICES DATA OUT TOKENS [OPTION...]
#     training/study.sh "cuda:0 cuda:1" .training/data .training/study 80e6 --compile
#
# Rates first, by runs of a quarter of the tokens, five side by side; then the seven runs side by side, dealt to the devices, each followed
# by its tables; then, alone, the steps at the paper's shape; then everything in OUT/study.json. What is done is not done
# again. OPTIONs go to every command that trains. PYTHON names the interpreter (default: python3). What commands print
# goes to OUT/*.log. Several runs on one GPU want NVIDIA's multi-process service (grids/on_gpus.sh says how).
set -u
if [ $# -lt 4 ]; then
  echo "usage: training/study.sh DEVICES DATA OUT TOKENS [OPTION...]" >&2
  exit 2
fi
read -ra devices <<< "$1"
data=$2 out=$3 tokens=$4
shift 4
study() { "${PYTHON:-python3}" -m training.study "$@"; }
mkdir -p "$out"

if [ ! -e "$out/rates.json" ]; then
  study rates --data "$data" --out "$out" --tokens "$(awk "BEGIN { printf \"%d\", $tokens / 4 }")" \
    --beside 5 --device "${devices[0]}" "$@" > "$out/rates.log" 2>&1 || { tail -n 1 "$out/rates.log" >&2; exit 1; }
fi
running=() number=0
for run in adam osp muon muon+ssnorm muon+embproj adam:1 osp:1; do
  device=${devices[number++ % ${#devices[@]}]}
  (study run --data "$data" --out "$out" --runs "$run" --tokens "$tokens" --device "$device" "$@" &&
    study tables --data "$data" --out "$out" --runs "$run" --device "$device") > "$out/$run.log" 2>&1 &
  running+=($!)
done
failed=0
for each in "${running[@]}"; do wait "$each" || failed=1; done
[ -e "$out/overhead.json" ] ||
  study overhead --out "$out" --device "${devices[0]}" "$@" --shape osp-1.4b --batch 4 --micro 4 \
    --length 2048 > "$out/overhead.log" 2>&1 || failed=1
study collect --data "$data" --out "$out" --to "$out/study.json" || failed=1
[ $failed = 0 ] || echo "not all of it succeeded: see $out/*.log" >&2
exit $failed
