"""Rules of the token dispatcher and of what carries its all-to-alls."""

import importlib.util
import os
from typing import get_args

from megatron_scmoe.config import AllToAllName, ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


@rule("--moe-token-dispatcher-type", "--scmoe-overlap")
def allgather_is_not_overlapped(scmoe: ScMoEConfig, settings: Settings) -> None:
    if settings.moe_token_dispatcher_type == "allgather" and scmoe.overlap:
        raise ScMoEConfigError(
            "--moe-token-dispatcher-type allgather with --scmoe-overlap",
            "all-gather and reduce-scatter are not overlapped",
            "--moe-token-dispatcher-type alltoall, or --no-scmoe-overlap",
        )


_PACKAGES_OF_FLEX = {"deepep": ("deep_ep",), "hybridep": ("deep_ep",), "ncclep": ()}


@rule("--moe-token-dispatcher-type", "--moe-flex-dispatcher-backend")
def flex_has_its_package(scmoe: ScMoEConfig, settings: Settings) -> None:
    backend = settings.moe_flex_dispatcher_backend
    if settings.moe_token_dispatcher_type != "flex":
        return
    for package in _PACKAGES_OF_FLEX.get(backend, ()):
        if importlib.util.find_spec(package) is None:
            raise ScMoEConfigError(
                f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend}",
                f"the package {package} is not installed",
                "--moe-token-dispatcher-type alltoall, or install the package",
            )


@rule("--moe-enable-deepep", "--moe-token-dispatcher-type")
def deepep_is_a_backend_of_flex(scmoe: ScMoEConfig, settings: Settings) -> None:
    dispatcher = settings.moe_token_dispatcher_type
    if settings.moe_enable_deepep and dispatcher != "flex":
        raise ScMoEConfigError(
            f"--moe-enable-deepep with --moe-token-dispatcher-type {dispatcher}",
            "DeepEP carries the tokens of --moe-token-dispatcher-type flex alone",
            "leave the flag out",
        )


@rule("--scmoe-copy-engine-all-to-alls", "--scmoe-exchange")
def copied_needs_copy_engines(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not _uses_copy_engines(scmoe) and scmoe.copy_engine_all_to_alls is not None:
        raise ScMoEConfigError(
            f"--scmoe-copy-engine-all-to-alls {' '.join(scmoe.copy_engine_all_to_alls)} "
            f"with --scmoe-exchange {scmoe.exchange}",
            "there are no copy engines to carry them",
            "--scmoe-exchange copy-peer or copy-host",
        )


@rule("--scmoe-copy-engine-all-to-alls")
def copied_are_all_to_alls(scmoe: ScMoEConfig, settings: Settings) -> None:
    names = get_args(AllToAllName)
    if scmoe.copy_engine_all_to_alls is not None and not (
        scmoe.copy_engine_all_to_alls and set(scmoe.copy_engine_all_to_alls) <= set(names)
    ):
        raise ScMoEConfigError(
            f"--scmoe-copy-engine-all-to-alls {' '.join(scmoe.copy_engine_all_to_alls)}",
            "no such all-to-alls",
            ", ".join(names),
        )


@rule("--scmoe-exchange", "--moe-token-dispatcher-type")
def copy_engines_serve_the_alltoall_dispatcher(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _uses_copy_engines(scmoe) and settings.moe_token_dispatcher_type != "alltoall":
        raise ScMoEConfigError(
            f"--scmoe-exchange {scmoe.exchange} with --moe-token-dispatcher-type "
            f"{settings.moe_token_dispatcher_type}",
            "that dispatcher has communication of its own",
            "--moe-token-dispatcher-type alltoall, or --scmoe-exchange collective",
        )


@rule("--scmoe-exchange")
def copy_engines_are_those_of_a_gpu(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _uses_copy_engines(scmoe) and cpu_backend.is_enabled():
        raise ScMoEConfigError(
            f"--scmoe-exchange {scmoe.exchange}",
            "there is no GPU whose engines could copy",
            "collective",
        )


@rule("--scmoe-exchange")
def copies_have_a_hardware_queue(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _uses_copy_engines(scmoe) and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ScMoEConfigError(
            f"--scmoe-exchange {scmoe.exchange} with CUDA_DEVICE_MAX_CONNECTIONS=1",
            "with one hardware queue compute would wait behind the copies",
            "collective, or CUDA_DEVICE_MAX_CONNECTIONS=32",
        )


@rule("--scmoe-exchange")
def copy_engines_have_their_package(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not _uses_copy_engines(scmoe):
        return
    if not (importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")):
        raise ScMoEConfigError(
            f"--scmoe-exchange {scmoe.exchange}",
            "the package cuda-bindings is not installed",
            "collective",
        )


def _uses_copy_engines(scmoe: ScMoEConfig) -> bool:
    return scmoe.exchange in ("copy-host", "copy-peer")
