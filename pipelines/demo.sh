#!/usr/bin/env bash
# The main job on the default lens: trace a training grid and a held-out store of other points, make the default
# model, and judge it on the held-out points.
#   pipelines/demo.sh [FOLDER]      (default: demo)
set -euo pipefail
configs=$(cd "$(dirname "$0")/../configs" && pwd)
mkdir -p "${1:-demo}"
cd "${1:-demo}"
say() { printf '\n--- %s\n' "$*" >&2; }

say "1/4 trace a 10 x 10 grid of the field"
psfgen render "$configs/render/demo.yaml" --out train.zarr
say "2/4 trace 400 other points to judge on"
psfgen render "$configs/render/demo.yaml" --layout random --grid 20 --seed 2 --out heldout.zarr
say "3/4 draw the kernels"
psfgen show train.zarr --out kernels.png
say "4/4 make the model, and judge it on the points it never saw"
psftrain fit --store train.zarr --run runs/demo
psftrain eval runs/demo --store heldout.zarr
echo
echo "in $PWD: kernels.png, runs/demo/eval/examples.png, runs/demo/eval/error_map.png, runs/demo/eval/report.md"
