#!/usr/bin/env bash
# What build.sh runs in the stand-in for NVIDIA's image: stand_in.sh TORCH NUMPY TRANSFORMER_ENGINE
set -euo pipefail
ldconfig

# CUDA's stub of the driver's library, as far as a loader asks: it has the name, and no function.
mkdir -p /usr/local/cuda/lib64/stubs
gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o /usr/local/cuda/lib64/stubs/libcuda.so

python3 -m ensurepip --default-pip
# /wheels keeps what was downloaded or compiled, for the next time.
install() {
    pip wheel --no-build-isolation --find-links /wheels --wheel-dir /wheels "$@"
    pip install --no-compile --no-index --find-links /wheels "$@"
}
install setuptools wheel
install "torch==$1" "numpy==$2" packaging
# Transformer Engine's half for PyTorch is compiled against CUDA's headers from PyPI. Its setup asks
# CUDA's compiler for the version, and nothing more.
export NVTE_BUILD_USE_NVIDIA_WHEELS=1 CUDA_HOME=/tmp/cuda
mkdir -p "$CUDA_HOME/bin"
printf '#!/bin/sh\necho "release 13.0"\n' >"$CUDA_HOME/bin/nvcc"
chmod +x "$CUDA_HOME/bin/nvcc"
install ninja "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*"
install "transformer-engine[core-cu13,pytorch]==$3" "torch==$1" "numpy==$2"
rm -r "$CUDA_HOME"

# As in NVIDIA's image: the loader finds CUDA's libraries, every package is held at its version, and
# pip finds itself not in charge.
ls -d /usr/local/lib/python3.12/site-packages/nvidia/*/lib >/etc/ld.so.conf.d/cuda.conf
ldconfig
mkdir -p /etc/pip
pip list --format freeze >/etc/pip/constraint.txt
echo "[externally-managed]" >/usr/local/lib/python3.12/EXTERNALLY-MANAGED
