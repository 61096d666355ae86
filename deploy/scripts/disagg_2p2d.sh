#!/usr/bin/env bash
# 2 prefill workers, 2 decode workers and a proxy on this machine, until Ctrl-C. Settings: see _disagg.sh.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/_disagg.sh"

start_prefiller prefiller1 0 0 # GPU 0
start_prefiller prefiller2 1 1 # GPU 1
start_decoder decoder1 0 2     # GPU 2
start_decoder decoder2 1 3     # GPU 3
start_proxy 2 2
serve "$PREFILL_PORT" $((PREFILL_PORT + 1)) "$DECODE_PORT" $((DECODE_PORT + 1))
