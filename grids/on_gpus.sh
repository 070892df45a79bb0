#!/usr/bin/env bash
# Fill grids by several commands a GPU, which share the cells of each grid's folder:
#
#     grids/on_gpus.sh GPUS COMMANDS GRID...      such as: grids/on_gpus.sh 2 8 quad boost
#
# A small model leaves most of a GPU idle while Python prepares the next launch. Without NVIDIA's multi-process service
# (`nvidia-cuda-mps-control -d`, one for each GPU, with CUDA_VISIBLE_DEVICES and CUDA_MPS_PIPE_DIRECTORY of its own) the
# commands take turns; with it their kernels run side by side: the 70 cells of fptquant.yaml took eight minutes on one
# H200 beside training, by nine commands. Times and speeds of cells that ran so say nothing.
#
# PYTHON names the interpreter (default: python3); what commands print goes to results/GRID/GPU-NUMBER.log.
set -u
if [ $# -lt 3 ]; then
  echo "usage: grids/on_gpus.sh GPUS COMMANDS GRID..." >&2
  exit 2
fi
gpus=$1 commands=$2
shift 2
for grid in "$@"; do
  [ -f "grids/$grid.yaml" ] || { echo "no grids/$grid.yaml: run this from the root of the clone" >&2; exit 2; }
  mkdir -p "results/$grid"
done

fill() {
  export CUDA_VISIBLE_DEVICES=$1 OMP_NUM_THREADS=1
  local status=0
  for grid in "${@:3}"; do
    "${PYTHON:-python3}" -m harness.grid "grids/$grid.yaml" --device cuda --threads 1 --in-process --quiet \
      --out "results/$grid" > "results/$grid/$1-$2.log" 2>&1 || status=1
  done
  return $status
}

running=()
for ((gpu = 0; gpu < gpus; gpu++)); do
  for ((number = 1; number <= commands; number++)); do
    fill "$gpu" "$number" "$@" &
    running+=($!)
  done
done
failed=0
for each in "${running[@]}"; do wait "$each" || failed=1; done
exit $failed
