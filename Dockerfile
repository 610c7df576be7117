# megatron_scmoe on NVIDIA's PyTorch image, which brings torch, Transformer Engine and NCCL, built
# for one another. They stay as they are: nothing here installs or replaces one of them.
#
#     docker build -t megatron-scmoe .
#     docker build -t megatron-scmoe --build-arg NGC_PYTORCH=nvcr.io/nvidia/pytorch:25.12-py3 .
#     docker build -t megatron-scmoe --build-arg WITH_DEEP_EP=1 --build-arg IMAGE_USER=trainer .
#     docker run --rm --gpus all --ipc host megatron-scmoe          # versions, and a smoke test
#     docker run --rm -it megatron-scmoe make test PYTHON=python3    # nothing more is installed
#     buildah build --format docker -t megatron-scmoe .             # or with buildah, 1.28 or newer
#
# Needs BuildKit (Docker 23 or newer), and an image with Python 3.12: any release of 2025 or later.
# `make test-image` builds it on a stand-in for NVIDIA's image.

ARG NGC_PYTORCH=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${NGC_PYTORCH}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The image's own constraints hold every Python package at one version and leave no room for what is
# needed beside torch. The next step writes narrower ones.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /workspace/megatron_scmoe
COPY pyproject.toml ./
COPY docker/sort_requirements.py docker/
RUN python3 docker/sort_requirements.py /opt/scmoe \
    && pip install --constraint /opt/scmoe/kept.txt --requirement /opt/scmoe/needs.txt \
    && pip install --no-deps --requirement /opt/scmoe/alone.txt

# --moe-token-dispatcher-type flex needs it. It is compiled here, for Hopper: minutes, and NVSHMEM.
ARG WITH_DEEP_EP=0
ARG DEEP_EP_COMMIT=e3908bf5bd0cc6265bcb225d15cd8c996d4759ef
ARG TORCH_CUDA_ARCH_LIST=9.0
RUN if [ "$WITH_DEEP_EP" = 1 ]; then \
        command -v nvcc >/dev/null \
            || { echo "WITH_DEEP_EP=1: no nvcc; accepted: an NGC_PYTORCH with CUDA's compiler" >&2; exit 1; }; \
        pip install --no-deps --no-build-isolation \
            "deep_ep @ git+https://github.com/deepseek-ai/DeepEP.git@${DEEP_EP_COMMIT}"; \
    fi

COPY . .

# The image is of use only if the check holds. A build has no driver, and some releases of Transformer
# Engine do not load without its library: CUDA's stub stands in for it in this step alone.
# Whoever runs the container may write here: the demo and the tests do.
RUN pip install --no-deps . \
    && stub=$(mktemp -d) && ln -s /usr/local/cuda/lib64/stubs/libcuda.so "$stub/libcuda.so.1" \
    && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:$stub" python3 docker/check_image.py /opt/scmoe \
    && rm -rf "$stub" build ./*.egg-info /tmp/torchinductor* \
    && useradd --create-home trainer \
    && chmod -R a+rwX /workspace/megatron_scmoe

# root, or trainer. Any other works too (docker run --user 1234:1234), without an entry in passwd and
# without a home: PyTorch names its cache by LOGNAME, where it would ask passwd.
ARG IMAGE_USER=root
ENV HF_HOME=/tmp/huggingface \
    LOGNAME=container \
    MPLCONFIGDIR=/tmp/matplotlib \
    TRITON_CACHE_DIR=/tmp/triton
USER ${IMAGE_USER}
CMD ["docker/smoke_test.sh"]
