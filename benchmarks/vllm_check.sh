#!/bin/sh
# Runs the tests marked vllm on a machine without a GPU and without vLLM's compiled parts.
#
#     sh benchmarks/vllm_check.sh [folder] [python]
#
# folder   where the environment is built (default: .venv-vllm); delete it afterwards
# python   an interpreter with torch, pytest and the tests' packages, and with a transformers in the range of the
#          chosen vLLM (default: .venv-floor/bin/python, made by `make test-floor`)
#
# vLLM's wheel is downloaded (about 340 MB), and only its Python files are used: the Transformers backend builds the
# model, replaces its layers and loads the weights in plain Python. The version is renamed to "...+cpu", by which vLLM
# chooses its CPU platform, and the packages that it imports on the way are installed without their own dependencies,
# so that torch and transformers stay those of the given interpreter.
#
# Expected: 4 passed within a few minutes. Each test prints the number of key/value layers, of loaded tensors, and the
# largest difference of the logits from the model's own (about 3e-6 in float32).
set -eu

FOLDER=${1:-.venv-vllm}
PYTHON=${2:-.venv-floor/bin/python}
VLLM=0.33.0

"$PYTHON" -m venv "$FOLDER"
NEW="$FOLDER/bin/python"
PLACE=$("$NEW" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$PLACE/given.pth"

"$NEW" -m pip download --quiet --no-deps --dest "$FOLDER/wheels" "vllm==$VLLM"
"$NEW" - "$FOLDER" "$PLACE" "$VLLM" <<'PY'
import sys
import zipfile
from pathlib import Path

folder, place, version = sys.argv[1:]
(wheel,) = Path(folder, "wheels").glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.endswith((".py", ".json")) or ".dist-info/" in name:
            archive.extract(name, place)
info = Path(place, f"vllm-{version}.dist-info").rename(Path(place, f"vllm-{version}+cpu.dist-info"))
metadata = info / "METADATA"
metadata.write_text(metadata.read_text().replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1))
PY

"$NEW" -m pip install --quiet --no-deps \
    aiohappyeyeballs aiohttp aiosignal apache-tvm-ffi attrs cachetools cbor2 certifi charset-normalizer cloudpickle \
    einops fastapi frozenlist httpx2 idna llguidance msgspec multidict openai openai-harmony opentelemetry-api \
    partial-json-parser pillow prometheus-client propcache psutil py-cpuinfo pybase64 pyzmq regex requests sniffio \
    starlette urllib3 uvloop xgrammar yarl

"$NEW" -m pytest -m vllm tests/integration/test_vllm_backend.py
