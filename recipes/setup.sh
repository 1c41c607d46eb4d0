# Sourced by recipes/demo.sh and tests/run.sh: makes .venv on a fresh machine and activates it.
# Safe to run twice: nothing is installed again while the requirements, this file and the Python stay the same.
# Python: set PYTHON=/path/to/python3.12 to choose; otherwise the first 3.11 or 3.12 found.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null; then
      command -v "$candidate"; return 0
    fi
  done
  echo "setup: no Python 3.11 or 3.12 with venv was found (tried ${PYTHON:+$PYTHON, }python3.11, python3.12, python3)." \
       "Install one (Debian: apt-get install python3-venv) or set PYTHON=/path/to/python" >&2
  return 1
}

write_placeholder_wheels() {  # name and version only; see requirements-cpu.txt for why
  "$1" - "$ROOT/.wheels" <<'PY'
import os, sys, zipfile
folder = sys.argv[1]
os.makedirs(folder, exist_ok=True)
for name, version in {"torchvision": "0.0+none", "torchaudio": "0.0+none", "torchcodec": "99.0+none", "triton": "99.0+none"}.items():
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: setup.sh\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
PY
}

check_compiler() {  # triton compiles its launchers for this Python on the GPU machine
  local header
  header=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  if [ -f "$header" ] && command -v "${CC:-gcc}" clang >/dev/null; then return 0; fi
  echo "setup: triton needs a C compiler (gcc, clang or \$CC) and Python's headers ($header) on a GPU machine." \
       "Install them (Debian: apt-get install gcc python3-dev) or set PYTHON to a Python that has its headers" >&2
  return 1
}

setup_environment() {
  local python requirements=requirements-cpu.txt size="3 GB" stamp
  python=$(find_python) || return 1
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    requirements=requirements.txt size="10 GB"
    check_compiler "$python" || return 1
  fi
  stamp=$(cat "$ROOT/$requirements" "$ROOT/recipes/setup.sh" <("$python" -VV) | sha256sum | cut -d' ' -f1)
  if [ "$(cat "$ROOT/.venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "setup: installing $requirements into .venv with $("$python" -V) (about 3 minutes, $size; only when something changed)"
    rm -rf "$ROOT/.venv"
    "$python" -m venv "$ROOT/.venv" || return 1
    local pip=("$ROOT/.venv/bin/python" -m pip --disable-pip-version-check)
    if [ "$requirements" = requirements-cpu.txt ]; then
      write_placeholder_wheels "$python" || return 1
      # PyPI has CUDA builds of torch only. Where pip's own configuration does not know a CPU build, ask PyTorch's index.
      if ! "${pip[@]}" download --quiet --no-deps --dest "$ROOT/.wheels" "$(grep '^torch==' "$ROOT/$requirements")" >/dev/null 2>&1; then
        export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:+$PIP_EXTRA_INDEX_URL }https://download.pytorch.org/whl/cpu"
      fi
    fi
    (cd "$ROOT" && "${pip[@]}" install -qq --progress-bar off -r "$requirements") || {
      echo "setup: pip could not install $requirements (its message stands above); run the command again to retry" >&2; return 1; }
    echo "$stamp" > "$ROOT/.venv/stamp"
  fi
  # shellcheck disable=SC1091
  source "$ROOT/.venv/bin/activate"
}

setup_environment
