"""The sets of resident ranks; light to import, so that they start first."""

import torch

from megatron_scmoe.platform import cpu_backend

GPUS = 0 if cpu_backend.is_enabled() else torch.cuda.device_count()

# Read once by a process: ranks that were started with them.
HOST_STAGED = {"NCCL_P2P_DISABLE": "1"}
EXACT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVIDIA_TF32_OVERRIDE": "0",
}
# Tensor and context parallelism want one hardware queue.
EXACT_ONE_QUEUE = EXACT | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
