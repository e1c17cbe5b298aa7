# Makes a virtual environment with fxresu in it, once. Sourced by tools/demo and tools/test.

FXRESU_VENV="${FXRESU_VENV:-.venv}"
# The release that the project is checked on. Where pip has a CPU build of it, that is what it takes.
FXRESU_TORCH="${FXRESU_TORCH:-torch==2.13.0}"

fxresu_environment() {
    local extras="${1:+[$1]}"
    local wanted="$FXRESU_TORCH fxresu$extras $(cksum <pyproject.toml)"
    local stamp="$FXRESU_VENV/.fxresu${1:+-$1}"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "fxresu needs Python 3.11 or later; $python is $("$python" -V). Set PYTHON to another one." >&2
        exit 2
    }
    command -v g++ >/dev/null || echo "warning: no g++ found; torch.compile needs it on a CPU" >&2
    echo "setting up $FXRESU_VENV (once; a few minutes) ..." >&2
    [ -x "$FXRESU_VENV/bin/python" ] || "$python" -m venv "$FXRESU_VENV"
    local pip=("$FXRESU_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "$FXRESU_TORCH"
    "${pip[@]}" --editable ".$extras"
    echo "$wanted" >"$stamp"
}

# Chromium for the tests of HTML pages, from the system's packages. Without it those tests are skipped, and say so.
fxresu_browser() {
    if command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        return 0
    fi
    echo "installing chromium (once) ..." >&2
    local apt=(timeout 300 apt-get -qq -y -o Acquire::Retries=1 -o DPkg::Lock::Timeout=60)
    {
        "${apt[@]}" update
        DEBIAN_FRONTEND=noninteractive "${apt[@]}" install --no-install-recommends chromium fonts-dejavu-core
    } >/dev/null 2>&1 </dev/null || echo "warning: chromium could not be installed; tests of HTML pages are skipped" >&2
}
