#!/bin/bash
# The GPU tables in one go, on a machine with four GPUs (or two) that is lent for half an hour: one step a call, each
# under ten minutes, each leaving its JSON whatever comes after it. From the repository's root:
#
#   benchmarks/gpu/session.sh kvbelt [OUT]       every shape and rate of one system; likewise aggregated, nixl
#   benchmarks/gpu/session.sh belt [OUT]         the belt alone, every byte compared, briefly
#   benchmarks/gpu/session.sh compare KEY=VALUE [OUT]    kvbelt as it is, and beside it kvbelt with another setting
#   benchmarks/gpu/session.sh table [OUT]
#
# and on a machine with one GPU, for what does not need two:
#
#   benchmarks/gpu/session.sh bytes [OUT]        tests/gpu, the belt alone, and vLLM with every byte of KV compared
#   benchmarks/gpu/session.sh settings OUT VARIANT...    in_turn.py: kvbelt with several settings
#
# With four GPUs a system is started once, as 2p2d, and gives two repetitions of 1p1d at the same time (its halves, with
# GPUs and cores of their own) and then 2p2d. With two it is 1p1d, REPETITIONS one after the other, each of LOAD_SECONDS.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 UCX_TLS=cuda_ipc,cuda_copy,tcp
MODEL=${MODEL:-/tmp/llama8b}
LOAD_SECONDS=${LOAD_SECONDS:-40} REPETITIONS=${REPETITIONS:-2}
step=${1:?kvbelt, aggregated, nixl, belt, compare, bytes, settings or table}
shift
setting=
[ "$step" != compare ] || { setting=${1:?KEY=VALUE}; shift; }
out=${1:-gpu-results}
[ $# -eq 0 ] || shift
mkdir -p "$out"
gpus=$(nvidia-smi -L | wc -l)
case $step in
bytes | settings | table) ;;
*) [ "$gpus" -ge 2 ] || { echo "two GPUs are needed, here are $gpus" >&2; exit 1; } ;;
esac
[ -e "$MODEL/config.json" ] || python3 benchmarks/gpu/dummy_model.py "$MODEL"

# serve SYSTEM OUT ARGUMENTS...: all systems alike. Fewer sequences at once mean fewer CUDA graphs to capture; none of
# these loads has so many.
serve() {
    system=$1 to=$2
    shift 2
    python3 -m benchmarks.gpu.serving run --model "$MODEL" --system "$system" --out "$to" \
        --seconds "$LOAD_SECONDS" --min-prompts "$LOAD_SECONDS" --server=--max-num-seqs --server=64 "$@"
}

# Logs as one file.
pack() { tar czf "$1/logs-$2.tar.gz" -C "$1" --exclude '*.json' logs && rm -r "$1/logs"; }

case $step in
kvbelt | aggregated | nixl)
    shape=(--rate 1 --rate 4 --repetitions "$REPETITIONS")
    [ "$gpus" -lt 4 ] || shape=(--shape 2p2d --halves --half-rate 1 --half-rate 4 --rate 2 --rate 8)
    trap 'pack "$out" "$step"' EXIT
    serve "$step" "$out" "${shape[@]}" --budget 520
    ;;
belt)
    timeout 240 python3 benchmarks/gpu/belt.py --brief --rounds 6 --out "$out"
    ;;
compare)
    [ "$gpus" -ge 4 ] || { echo "comparing side by side takes four GPUs" >&2; exit 1; }
    other=(env "$setting") kv=()
    # The connector's own settings, or environment variables of traced.py.
    case $setting in pd_*) other=(env) kv=(--kv "$setting") ;; esac
    name=${setting//[^A-Za-z0-9_.-]/-}
    load=(--trace --rate 4 --budget 520)
    serve kvbelt "$out/as-it-is" "${load[@]}" --lane 0/2 &
    first=$!
    export -f serve
    export MODEL LOAD_SECONDS
    "${other[@]}" bash -euc 'serve "$@"' serve kvbelt "$out/$name" "${load[@]}" --lane 1/2 "${kv[@]}" &
    wait "$first" $!
    for folder in "$out/as-it-is" "$out/$name"; do
        echo "$folder"
        python3 -m benchmarks.gpu.serving table --out "$folder"
        pack "$folder" kvbelt
    done
    ;;
bytes)
    # Side by side on one GPU: what counts is what the bytes are, not when they come.
    python3 -m pytest -q -W default -p no:cacheprovider tests/gpu tests/engine/test_cuda.py tests/transfer/test_paged_copy.py \
        >"$out/tests.log" 2>&1 &
    tests=$!
    timeout 300 python3 benchmarks/gpu/belt.py --gpus 0,0 --brief --rounds 4 --out "$out" >"$out/belt.log" 2>&1 &
    belt=$!
    trap 'kill "$tests" "$belt" 2>/dev/null || true' EXIT
    [ -e "$MODEL-small/config.json" ] || python3 benchmarks/gpu/dummy_model.py "$MODEL-small" --small
    status=0
    python3 -m benchmarks.gpu.serving run --model "$MODEL-small" --system kvbelt --out "$out" --gpus 0,0 --trace \
        --server=--load-format --server=auto --server=--gpu-memory-utilization --server=0.2 --server=--max-num-seqs \
        --server=64 --server=--kv-cache-memory-bytes=8000000000 --kv pd_verify=always --rate 1 --rate 8 --seconds 20 --min-prompts 20 || status=1
    pack "$out" small
    wait "$tests" || status=1
    wait "$belt" || status=1
    tail -n 15 "$out/tests.log" "$out/belt.log"
    exit "$status"
    ;;
settings)
    variants=()
    for variant; do variants+=(--variant "$variant"); done
    python3 -m benchmarks.gpu.in_turn --model "$MODEL" --out "$out" --budget 480 "${variants[@]}" || status=$?
    for folder in "$out"/*/; do [ ! -d "$folder/logs" ] || pack "${folder%/}" kvbelt; done
    exit "${status:-0}"
    ;;
table) python3 -m benchmarks.gpu.serving table --out "$out" ;;
*) echo "'$step' is no step" >&2 && exit 1 ;;
esac
