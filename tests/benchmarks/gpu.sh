#!/usr/bin/env bash
# All that needs a GPU, in one run: tests, images/s beside a bare loop, steps without a synchronization, mixed precision,
# EMA and resuming, and as many of the six CIFAR-10 recipes as the time allows.
#
#   tests/benchmarks/gpu.sh [OUTPUT]                    # DATA_ROOT: where CIFAR-10 is, for the recipes
#   DEVICE=cpu STEPS=2 tests/benchmarks/gpu.sh out      # shows on any machine that it runs
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/gpu} device=${DEVICE:-cuda} steps=${STEPS:-200} python=${PYTHON:-python}
amp=bf16 compile=on batch=128 rounds=3
[ "$device" = cuda ] || amp=off compile=off batch=8 rounds=1
mkdir -p "$output"
exec > >(tee "$output/log.txt") 2>&1

title() { printf '\n== %s\n' "$*"; }
measure() { "$python" tests/benchmarks/throughput.py --device "$device" --steps "$steps" --batch-size $batch --rounds $rounds "$@"; }
small() { "$python" "$1" --device "$device" --model resnet8 --overwrite "${@:2}"; }

title tests that need a GPU
"$python" -m pytest -q tests/test_step.py tests/test_augment.py tests/test_loader.py

title operations and host time of a step
measure --steps-alone

title "CNN pair, eager and float32, and with $amp, compile $compile"
measure
measure --amp $amp --compile $compile

title ViT pair, class and patch tokens
measure --tokens --teacher vit_tiny --student vit_6_192 --amp $amp --compile $compile

title mixed precision, EMA and a resumed run
[ "$device" = cuda ] && precisions="bf16 fp16" || precisions="bf16"
for precision in $precisions; do
  small train_student.py --amp "$precision" --ema 0.99 --clip-grad 1 --epochs 4 --output "$output/whole_$precision"
  small train_student.py --amp "$precision" --ema 0.99 --clip-grad 1 --epochs 2 --schedule constant \
    --output "$output/part_$precision"
  "$python" train_student.py --resume "$output/part_$precision" --epochs 4
done

if [ -n "${DATA_ROOT:-}" ] && [ "$device" = cuda ]; then
  title the six CIFAR-10 recipes
  slurm/lab.sh --local --runs "$output/recipes"
fi
