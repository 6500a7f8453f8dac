#!/bin/sh
# Installs the torch that constraints.txt pins into the given interpreter's environment.
#
#   sh scripts/install_torch.sh .venv/bin/python
#
# Run it before anything else is installed: torch on PyPI is the CUDA build for Linux and brings gigabytes of
# libraries that a machine without an NVIDIA GPU cannot use.
#   - a torch that can be imported already is kept, whatever its version or build;
#   - with an NVIDIA GPU, or on macOS: the build on PyPI, with its dependencies;
#   - otherwise: the CPU build alone, from the PyTorch index or from any place that pip's own find-links name.
#     Its dependencies are ordinary packages and come with the installation of cognexis.
set -eu

python=${1:?"usage: install_torch.sh PYTHON"}
constraints=$(dirname "$0")/../constraints.txt
version=$(sed -n 's/^torch==//p' "$constraints")
cpu_index=https://download.pytorch.org/whl/cpu

# --no-compile: importing compiles the few modules that are used; compiling all of them takes longer than the rest.
pip_install() {
    "$python" -m pip install -qq --no-compile "$@"
}

has_nvidia_gpu() {
    nvidia-smi >/dev/null 2>&1 || [ -e /dev/nvidiactl ]
}

if found=$("$python" -c "import torch; print(torch.__version__)" 2>/dev/null); then
    case $found in
        "$version" | "$version"+*) echo "torch $found is installed" ;;
        *) echo "torch $found is installed and kept; cognexis is tested with $version" ;;
    esac
elif has_nvidia_gpu; then
    echo "NVIDIA GPU found: installing torch $version with CUDA"
    # Three equal signs: a CPU build (2.13.0+cpu) in a local wheel folder must not be taken for the one on PyPI.
    pip_install --constraint "$constraints" "torch===$version"
    "$python" - <<'PYTHON'
import torch

if not torch.cuda.is_available():
    print(f"warning: torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPU, perhaps because the")
    print("driver is older. Install a matching build into the virtual environment; this script keeps it.")
PYTHON
elif [ "$(uname -s)" = Darwin ]; then
    pip_install --constraint "$constraints" "torch==$version"
else
    echo "no NVIDIA GPU found: installing the CPU build of torch $version"
    # One short attempt: where the index cannot be reached, find-links serve the wheel or pip ends with an error.
    pip_install --no-deps --retries 0 --timeout 15 --index-url "$cpu_index" "torch==$version+cpu" || {
        echo "The CPU build of torch $version was not found. Install a torch into the environment of $python" >&2
        echo "by hand (it will be kept), or name a folder with the wheel in PIP_FIND_LINKS." >&2
        exit 1
    }
fi
