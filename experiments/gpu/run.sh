#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that ask for one, then what a random model of Llama-3-8B's shape takes.
#
#     bash experiments/gpu/run.sh [--shape 8B] [--work DIR]
#
# It needs torch and transformers. ffgym and what else it needs are installed from the folder `wheels` beside this file.
# Where there is none, nothing is installed: `pip install -e '.[recover]' pytest pytest-timeout hypothesis` first.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -d experiments/gpu/wheels ]; then
    python -m pip install --quiet --no-index --find-links experiments/gpu/wheels \
        --editable '.[recover]' pytest pytest-timeout hypothesis
fi
python -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
python -m pytest -q -k "gpu" tests/models/test_stream.py tests/recover/test_lora.py
python experiments/gpu/on_gpu.py "$@"
