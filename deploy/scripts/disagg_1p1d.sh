#!/usr/bin/env bash
# 1 prefill worker, 1 decode worker and a proxy on this machine, until Ctrl-C. Settings: see _disagg.sh. For example
#   HF_TOKEN=hf_… deploy/scripts/disagg_1p1d.sh                               # two GPUs, vLLM
#   ENGINE=embedded deploy/scripts/disagg_1p1d.sh                             # a laptop, with the demo model
set -u
. "$(dirname "${BASH_SOURCE[0]}")/_disagg.sh"

start_prefiller prefiller 0 0 # GPU 0
start_decoder decoder 0 1     # GPU 1
start_proxy 1 1
serve "$PREFILL_PORT" "$DECODE_PORT"
