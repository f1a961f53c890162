#!/usr/bin/env bash
# Quality at equal served speed: what llama.cpp makes of the demo model after three ways to remove a share of the time.
#
#     bash experiments/serving/equal_speed.sh [SHARE]
#
# It needs llama-server on the PATH and a machine that does nothing else. The models go to runs/served-*.
set -euo pipefail
cd "$(dirname "$0")/../.."
share=${1:-0.2}
here=experiments/serving
served=(--batch-sizes 4 --prompt-lengths 256 --output-tokens 64 --repetitions 15)
latency=(--resource latency --latency-table $here/llama-cpp.json --set prune.context=320 --sparsity "$share")

test -e $here/llama-cpp.json ||
    ffgym latency demo --engine llama-cpp --context 320 --output-tokens 64 --batch-size 4 --output $here/llama-cpp.json
ffgym run "${latency[@]}" --episodes 96 --output runs/served-searched
# The finals measure every shape that fits, however short the search.
ffgym run "${latency[@]}" --uniform --set search.episodes=8 --output runs/served-uniform
python $here/depth.py $here/llama-cpp.json "$share" runs/served-depth
for way in searched uniform depth; do
    ffgym measure runs/served-$way --dense demo --engine llama-cpp "${served[@]}" --output $here/$way.md --overwrite
done
ffgym eval dense runs/served-searched/model runs/served-uniform/model runs/served-depth --tasks loss \
    --output $here/quality.md --overwrite
