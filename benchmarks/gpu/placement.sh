#!/bin/bash
# placement.py on a machine with two GPUs that is lent for half an hour and reaches no package registry: one step a
# call, each under ten minutes. Servers live on between the calls. From the repository's root:
#
#   placement.sh topology            how the GPUs are linked; needs torch alone
#   placement.sh unpack              takes what came as .gpu0/, .gpu1/, .gpu2/ (parts of an archive of packages) and
#                                    .wheels/; with the last part everything is unpacked into /tmp/site
#   placement.sh start [ARGUMENT...] all servers, from a copy of this tree: later changes reach only client and proxy
#   placement.sh rows SECONDS ARGUMENT...    placement.py rows, with this budget
#   placement.sh logs | table FILE... | stop
#
# Results and logs go to $OUT (default: gpu-results).
set -euo pipefail
cd "$(dirname "$0")/../.."
PARTS=${PARTS:-3} SITE=/tmp/site FOLDER=${FOLDER:-/tmp/kvbelt-placement} MODEL=${MODEL:-/tmp/llama8b}
OUT=${OUT:-gpu-results}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src:$PWD:$SITE"
step=${1:?unpack, topology, start, rows, logs, table or stop}
shift
mkdir -p "$OUT" "$FOLDER"
trap 'echo "$step: $SECONDS s"' EXIT

case $step in
unpack)
    mkdir -p /tmp/parts "$SITE"
    for part in .gpu*/part.*; do [ ! -e "$part" ] || mv "$part" /tmp/parts/; done
    if [ -d .wheels ]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" .wheels/*.whl
    fi
    set -- /tmp/parts/part.*
    echo "$# of $PARTS parts"
    if [ $# -eq "$PARTS" ] && [ ! -e "$SITE/vllm" ]; then
        cat "$@" | xz -dc -T0 | tar xf - -C "$SITE"
        # Four servers that start at once would each compile the same files.
        python3 -m compileall -q -j 0 "$SITE" >/tmp/compileall.log 2>&1 || true
        python3 -c 'import uvloop, xxhash, yaml, prometheus_client, structlog, httptools, msgspec, zmq, nixl, kvbelt.proxy.app'
    fi
    ;;
topology) python3 benchmarks/gpu/topology.py ;;
start)
    [ -e "$MODEL/config.json" ] || python3 benchmarks/gpu/dummy_model.py "$MODEL"
    rm -rf "$FOLDER/tree"
    mkdir "$FOLDER/tree"
    cp -r src benchmarks "$FOLDER/tree"
    cd "$FOLDER/tree"
    export PYTHONPATH="$PWD/src:$PWD:$SITE"
    python3 -m benchmarks.gpu.placement start --folder "$FOLDER" --model "$MODEL" "$@"
    ;;
rows)
    budget=${1:?seconds}
    shift
    python3 -m benchmarks.gpu.placement rows --folder "$FOLDER" --budget "$budget" --out "$OUT/rows.jsonl" "$@"
    ;;
logs) tar czf "$OUT/logs.tar.gz" -C "$FOLDER" logs ;;
table) python3 -m benchmarks.gpu.placement table "$@" ;;
stop) python3 -m benchmarks.gpu.placement stop --folder "$FOLDER" ;;
*) echo "'$step' is no step" >&2 && exit 1 ;;
esac
