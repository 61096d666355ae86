# Shared by disagg_1p1d.sh and disagg_2p2d.sh. Sourced, with bash.
#
# ENGINE            vllm, or embedded: kvbelt's own workers (default: vllm)
# MODEL             default: meta-llama/Llama-3.1-8B-Instruct; with ENGINE=embedded demo
# DEVICE            cuda or cpu; with cuda each worker has one GPU: 0, 1, …
#                   (default: cuda; with ENGINE=embedded cpu where there is no GPU)
# BUFFER_DEVICE     where KV is staged (default: $DEVICE)
# DIR               where logs and configuration files go (default: the current folder)
# WORKER_ARGS       more arguments for every worker
# PROXY_ARGS        more arguments for the proxy
# KVBELT            the kvbelt command (default: kvbelt)
# PROXY_PORT PREFILL_PORT DECODE_PORT INIT_PORT ALLOC_PORT NOTIFY_PORT LIVENESS_PORT
#                   the first of each kind (default: 9100 7100 7200 7300 7400 7500 7700)

ENGINE=${ENGINE:-vllm}
if [ "$ENGINE" = embedded ]; then
    MODEL=${MODEL:-demo}
    [ -e /dev/nvidia0 ] || DEVICE=${DEVICE:-cpu}
fi
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
DEVICE=${DEVICE:-cuda}
BUFFER_DEVICE=${BUFFER_DEVICE:-$DEVICE}
DIR=${DIR:-.}
KVBELT=${KVBELT:-kvbelt}
PROXY_PORT=${PROXY_PORT:-9100}
PREFILL_PORT=${PREFILL_PORT:-7100}
DECODE_PORT=${DECODE_PORT:-7200}
INIT_PORT=${INIT_PORT:-7300}
ALLOC_PORT=${ALLOC_PORT:-7400}
NOTIFY_PORT=${NOTIFY_PORT:-7500}
LIVENESS_PORT=${LIVENESS_PORT:-7700}

export PYTHONHASHSEED=0 PYTHONUNBUFFERED=1
# Without cuda_ipc a transfer between two GPUs of one machine takes a thousand times as long.
[ "$DEVICE" != cuda ] || export UCX_TLS=${UCX_TLS:-cuda_ipc,cuda_copy,tcp}

fail() {
    echo "$0: $*" >&2
    exit 2
}

case $ENGINE in
vllm) command -v vllm >/dev/null || fail "vllm is not installed; install it, or set ENGINE=embedded" ;;
embedded) ;;
*) fail "ENGINE is '$ENGINE'; it is vllm or embedded" ;;
esac
case $DEVICE in cuda | cpu) ;; *) fail "DEVICE is '$DEVICE'; it is cuda or cpu" ;; esac
read -r -a kvbelt <<<"$KVBELT"
read -r -a worker_args <<<"${WORKER_ARGS:-}"
read -r -a proxy_args <<<"${PROXY_ARGS:-}"
command -v "${kvbelt[0]}" >/dev/null || fail "there is no ${kvbelt[0]}; install kvbelt, or set KVBELT to its path"
mkdir -p "$DIR" || fail "DIR is '$DIR', and cannot be made"

pids=()
names=()

stop() {
    trap - EXIT INT TERM HUP
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null
    wait
}
trap stop EXIT
trap 'exit 0' INT TERM HUP

# start NAME COMMAND...: in the background, its log in NAME.log
start() {
    local name=$1
    shift
    "$@" >"$DIR/$name.log" 2>&1 &
    pids+=($!)
    names+=("$name")
}

# start_worker ROLE NAME GPU PORT CONFIG
start_worker() {
    local role=$1 name=$2 gpu=$3 port=$4 config=$5 command kv_role=kv_consumer
    [ "$role" = decode ] || kv_role=kv_producer
    if [ "$ENGINE" = vllm ]; then
        command=(vllm serve "$MODEL" --host 127.0.0.1 --port "$port" --kv-transfer-config
            "{\"kv_connector\":\"KVBeltConnector\",\"kv_connector_module_path\":\"kvbelt.vllm\",\"kv_role\":\"$kv_role\"}")
    else
        command=("${kvbelt[@]}" worker --role "$role" --model "$MODEL" --port "$port" --device "$DEVICE")
    fi
    local variables=("LMCACHE_CONFIG_FILE=$config")
    [ "$DEVICE" != cuda ] || variables+=("CUDA_VISIBLE_DEVICES=$gpu")
    start "$name" env "${variables[@]}" "${command[@]}" "${worker_args[@]}"
}

# start_prefiller NAME NUMBER GPU
start_prefiller() {
    local config=$DIR/prefiller-config.yaml
    cat >"$config" <<YAML
local_cpu: True
max_local_cpu_size: 5
enable_pd: True
transfer_channel: "nixl"
pd_role: "sender"
pd_proxy_host: "127.0.0.1"
pd_proxy_port: $NOTIFY_PORT
pd_buffer_size: 1073741824
pd_buffer_device: "$BUFFER_DEVICE"
YAML
    start_worker prefill "$1" "$3" $((PREFILL_PORT + $2)) "$config"
}

# start_decoder NAME NUMBER GPU: with a separate file, because each has its own ports
start_decoder() {
    local config=$DIR/$1-config.yaml
    cat >"$config" <<YAML
local_cpu: False
enable_pd: True
transfer_channel: "nixl"
pd_role: "receiver"
pd_peer_host: "127.0.0.1"
pd_peer_init_port: $((INIT_PORT + $2))
pd_peer_alloc_port: $((ALLOC_PORT + $2))
pd_peer_liveness_port: $((LIVENESS_PORT + $2))
pd_proxy_host: "127.0.0.1"
pd_proxy_port: $NOTIFY_PORT
pd_buffer_size: 2147483648
pd_buffer_device: "$BUFFER_DEVICE"
nixl_backends: [UCX]
YAML
    start_worker decode "$1" "$3" $((DECODE_PORT + $2)) "$config"
}

# start_proxy PREFILLERS DECODERS
start_proxy() {
    start proxy "${kvbelt[@]}" proxy --port "$PROXY_PORT" --notify-port "$NOTIFY_PORT" \
        --prefill-host 127.0.0.1 --prefill-port "$PREFILL_PORT" --num-prefillers "$1" \
        --decode-host 127.0.0.1 --decode-port "$DECODE_PORT" --num-decoders "$2" \
        "${proxy_args[@]}"
}

# The HTTP status of a URL's answer; empty without an answer.
status() {
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return
    printf 'GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n' "$2" >&3
    local code
    read -r -t 5 _ code _ <&3
    exec 3>&-
    echo "$code"
} 2>/dev/null

# A process that died ends everything; the end of its log is shown.
all_alive() {
    local index
    for index in "${!pids[@]}"; do
        kill -0 "${pids[index]}" 2>/dev/null && continue
        echo "$0: ${names[index]} has died; the end of $DIR/${names[index]}.log:" >&2
        tail -n 15 "$DIR/${names[index]}.log" >&2
        return 1
    done
}

# serve PORT... : wait until every worker and the proxy are ready, say so, and serve until Ctrl-C.
# The ports are in the order in which the workers were started.
serve() {
    local ports=("$@" "$PROXY_PORT") late=("${names[@]}") ready=() index shown=$SECONDS began=$SECONDS
    echo "$0: starting ${names[*]} of $MODEL on $DEVICE; logs are $DIR/NAME.log" >&2
    while [ ${#late[@]} -gt 0 ]; do
        all_alive || exit 1
        late=()
        for index in "${!ports[@]}"; do
            [ -z "${ready[index]:-}" ] || continue
            if [ "$(status "${ports[index]}" /health)" = 200 ]; then
                ready[index]=1
                echo "$0: ${names[index]} is ready after $((SECONDS - began)) s" >&2
            else
                late+=("${names[index]}")
            fi
        done
        if [ ${#late[@]} -gt 0 ] && [ $((SECONDS - shown)) -ge 2 ]; then
            echo "$0: $((SECONDS - began)) s: waiting for ${late[*]}" >&2
            shown=$SECONDS
        fi
        sleep 0.2
    done
    echo "disaggregated prefill is ready on http://127.0.0.1:$PROXY_PORT"
    wait -n "${pids[@]}"
    all_alive || exit 1
}
