#!/usr/bin/env bash
# The main job on the default lens: trace a training grid, a validation and a held-out store of other points,
# train the default model, and judge it on the held-out points.
#   pipelines/demo.sh [FOLDER]      (default: demo)
set -euo pipefail
configs=$(cd "$(dirname "$0")/../configs" && pwd)
mkdir -p "${1:-demo}"
cd "${1:-demo}"
say() { printf '\n--- %s\n' "$*" >&2; }

say "1/5 trace a 10 x 10 grid of the field"
psfgen render "$configs/render/demo.yaml" --out train.zarr
say "2/5 trace other points: 36 to validate on, 400 to judge on"
psfgen render "$configs/render/demo.yaml" --layout random --grid 6 --seed 1 --out val.zarr
psfgen render "$configs/render/demo.yaml" --layout random --grid 20 --seed 2 --out heldout.zarr
say "3/5 draw the kernels"
psfgen show train.zarr --out kernels.png
say "4/5 train"
psftrain fit "$configs/fit/field.yaml" --store train.zarr --val val.zarr --run runs/demo --set steps=2000
say "5/5 judge on the points the model never saw"
psftrain eval runs/demo --store heldout.zarr
echo
echo "in $PWD: kernels.png, runs/demo/eval/examples.png, runs/demo/eval/error_map.png, runs/demo/eval/report.md"
