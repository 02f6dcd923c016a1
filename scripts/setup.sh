# Sourced by the scripts beside it: makes .venv and installs srd-lab into it, with the extras given as $1 ("" or "[dev]").
# Needs python3 with venv and pip only; uses uv where it can be had, because it is much faster.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=".venv/.installed${1//[^a-z]/-}-$(python3 -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml","rb").read()).hexdigest()[:16])')"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    echo "installing into .venv (the first time takes some minutes: PyTorch is large)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
    .venv/bin/python -m uv pip install --quiet --python .venv/bin/python -e ".$1" 2>/dev/null ||
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$1"
    touch "$stamp"
fi
