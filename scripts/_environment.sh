# shellcheck shell=sh
# Makes .venv with what a script needs. The other scripts source it, in the repository's root.
#
#   prepare demo|test|check    install this extra of pyproject.toml, unless it is installed
#   $VENV_PYTHON               the environment's interpreter
#
# KVBELT_PYTHON        the Python 3.11+ that makes the environment
# KVBELT_TORCH_INDEX   a second package index, for torch; without it a machine without a GPU takes torch's CPU builds,
#                      if their index answers, because they are a tenth of the size; empty: never

VENV=.venv
VENV_PYTHON=$VENV/bin/python
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() {
    printf 'kvbelt: %s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

find_python() {
    for candidate in "${KVBELT_PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.14 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module was found; install one (Debian: python3 and python3-venv), or name it in KVBELT_PYTHON"
}

# step TITLE COMMAND...: run a long command quietly and show that it is alive; on failure show the end of its output.
step() {
    title=$1
    shift
    log=$VENV/install.log
    started=$(date +%s)
    "$@" >"$log" 2>&1 &
    job=$!
    trap 'kill "$job" 2>/dev/null; wait "$job" 2>/dev/null; [ -t 2 ] && printf "\n" >&2; exit 130' INT TERM HUP
    shown=$started
    while kill -0 "$job" 2>/dev/null; do
        sleep 0.2 2>/dev/null || sleep 1
        now=$(date +%s)
        if [ -t 2 ]; then
            doing=$(tail -n 1 "$log" | tr -d '\r' | cut -c 1-60)
            printf '\r\033[Kkvbelt: %s, %s s  %s' "$title" "$((now - started))" "$doing" >&2
        elif [ "$((now - shown))" -ge 15 ]; then
            say "$title, $((now - started)) s"
            shown=$now
        fi
    done
    status=0
    wait "$job" || status=$?
    trap - INT TERM HUP
    [ ! -t 2 ] || printf '\r\033[K' >&2
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$log" >&2
        fail "$title failed after $(($(date +%s) - started)) s (status $status); the whole output is in $log"
    fi
    say "$title: done in $(($(date +%s) - started)) s"
}

# pip_install ARGUMENTS...: install into the environment, with the versions of constraints.txt; with uv where it is there.
pip_install() {
    if have uv; then
        # As pip does, take the best version of all indexes, not those of the first that has the package, trust the
        # system's certificates, and compile: otherwise the first start would.
        UV_SYSTEM_CERTS=true uv pip install --compile-bytecode --python "$VENV_PYTHON" \
            --index-strategy unsafe-best-match -c constraints.txt "$@" && return
        echo "uv failed, as it does where only pip knows the index; trying pip"
    fi
    "$VENV_PYTHON" -m pip --disable-pip-version-check --no-input install --progress-bar off -c constraints.txt "$@"
}

# Print the folder of the demo model, which is fetched and converted on first use.
demo_model() {
    "$VENV_PYTHON" -c 'import sys; from kvbelt.ops.demo_model import demo_model_dir
print(demo_model_dir(lambda line: print(line, file=sys.stderr)))'
}

# Mooncake loads two libraries that pip cannot install.
have_mooncake_libraries() {
    "$VENV_PYTHON" -c 'import ctypes; [ctypes.CDLL(name) for name in ("libibverbs.so.1", "librdmacm.so.1")]' 2>/dev/null
}

have() {
    command -v "$1" >/dev/null
}

# bring_debian WHAT PACKAGE... -- COMMAND...: install Debian packages unless COMMAND succeeds, if we are root.
# Without them the tests of WHAT are skipped, so a failure here stops nothing.
bring_debian() {
    what=$1
    shift
    packages=
    while [ "$1" != -- ]; do
        packages="$packages $1"
        shift
    done
    shift
    "$@" && return
    if [ "$(id -u)" -eq 0 ] && have apt-get; then
        say "installing$packages with apt-get"
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086 # one word a package
        { apt-get update && apt-get install -y --no-install-recommends $packages; } >"$VENV/apt.log" 2>&1 || true
    fi
    "$@" || say "tests of $what will be skipped; they need the Debian packages$packages"
}

have_manual_tools() {
    have curl && have jq && have ucx_info
}

# Programs that the tests use and pip cannot install. Quick if they are installed.
bring_programs_of_tests() {
    bring_debian mooncake libibverbs1 librdmacm1 -- have_mooncake_libraries
    bring_debian "the console in a browser" chromium fonts-dejavu-core -- have chromium
    bring_debian "alerts in Prometheus" prometheus -- have promtool
    bring_debian "the commands in the docs" curl jq ucx-utils -- have_manual_tools
    bring_debian "deploy/systemd" systemd -- have systemd-analyze
    bring_kubectl_and_helm
}

# The programs that render deploy/. Without them its tests are skipped, except in CI.
bring_kubectl_and_helm() {
    [ -x "$VENV/tools/helm" ] && [ -x "$VENV/tools/kubectl" ] && return
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        step "fetching kubectl and helm" "$VENV_PYTHON" scripts/fetch-kubectl-and-helm "$VENV/tools"
    else
        say "tests of deploy/ will be skipped where kubectl and helm are not installed"
    fi
}

has_gpu() {
    [ -e /dev/nvidia0 ] || have nvidia-smi
}

# Whether a package index answers, within 3 s.
answers() {
    "${2:-$VENV_PYTHON}" -c 'import signal, sys, urllib.request
signal.alarm(3)
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3).close()' "$1" >/dev/null 2>&1
}

# Set KVBELT_TORCH_INDEX to that of torch's CPU builds, and say what the choice costs.
choose_torch() {
    [ -z "${KVBELT_TORCH_INDEX+set}" ] || return 0
    if has_gpu; then
        say "there is a GPU: torch with CUDA, several GB to download and on disk"
    elif answers "$TORCH_CPU_INDEX" "${1:-}"; then
        KVBELT_TORCH_INDEX=$TORCH_CPU_INDEX
        say "there is no GPU: torch's CPU build, about 0.5 GB to download and 1.5 GB on disk in all"
    else
        say "there is no GPU, but $TORCH_CPU_INDEX does not answer: torch from the usual index, which may bring CUDA, several GB"
    fi
}

make_environment() {
    python=$(find_python) || exit 1
    rm -rf "$VENV"
    mkdir "$VENV" # for step's log
    step "making $VENV with $("$python" --version)" "$python" -m venv "$VENV" # uv's own would lack pip
}

prepare() {
    extra=$1
    if [ -x "$VENV_PYTHON" ] && ! "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "$VENV is broken or older than Python 3.11"
        make_environment
    fi
    [ -x "$VENV_PYTHON" ] || make_environment

    # The stamp says what was installed last. It names the repository's folder, because the installation points to it.
    stamp=$(printf '%s %s' "$(cat pyproject.toml constraints.txt | cksum)" "$(pwd -P)")
    for bigger in "$extra" test check; do
        [ "$extra $bigger" != "check test" ] || continue
        if [ "$(cat "$VENV/.kvbelt-$bigger" 2>/dev/null)" = "$stamp" ]; then
            return
        fi
    done

    choose_torch
    step "installing kvbelt and what it needs for $extra" \
        pip_install ${KVBELT_TORCH_INDEX:+--extra-index-url "$KVBELT_TORCH_INDEX"} --editable ".[$extra]"
    printf '%s\n' "$stamp" >"$VENV/.kvbelt-$extra"
}
