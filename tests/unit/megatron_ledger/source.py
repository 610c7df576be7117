"""Megatron's source, read as text, so that a patch in this process hides nothing."""

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

LEDGER = re.findall(
    r"^\| `([^`]+)`",
    (Path(__file__).parents[3] / "docs" / "megatron.md").read_text(),
    re.MULTILINE,
)
"""The rows of docs/megatron.md."""

CLASSES = {
    kind.__name__: kind
    for kind in (
        *(ArgumentGroupFactory, ChainedOptimizer, DefaultLoadPlanner, DistributedOptimizer),
        *(DotProductAttention, GraphableMegatronModule, MLASelfAttention, MLP, MoELayer, Router),
        *(FileSystemWriterAsync, OptimizerParamScheduler, PersistentAsyncCaller),
        *(MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher, RouterReplay, RerunStateMachine),
        *(Attention, FP32Optimizer, FusedScaleMaskSoftmax),
        *(ColumnParallelLinear, LinearWithGradAccumulationAndAsyncCommunication),
        *(RowParallelLinear, SharedExpertMLP, TECudaGraphHelper, TopKRouter, TransformerLayer),
    )
}
"""What :func:`source` knows by the name of a class."""


def row(name: str) -> Callable:
    """Say of which row a function is the test; test_completeness.py reads it."""
    assert name in LEDGER, name
    return lambda test: test


@functools.cache
def definition(name: str) -> ast.FunctionDef:
    """Where Megatron defines ``Class.method`` or ``package.module.function``."""
    owner, _, last = name.rpartition(".")
    if owner in CLASSES:
        body = named(tree_of(inspect.getsourcefile(CLASSES[owner])).body, owner).body
    else:
        body = tree_of(importlib.import_module(owner).__file__).body
    return named(body, last)


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def named(body: list[ast.stmt], name: str):
    return next(node for node in body if getattr(node, "name", None) == name)


def source(name: str) -> str:
    return ast.unparse(definition(name))


def parameters(name: str) -> str:
    given = definition(name).args
    plain = [each.arg for each in (*given.posonlyargs, *given.args)]
    plain += [f"*{given.vararg.arg}"] if given.vararg else []
    plain += [each.arg for each in given.kwonlyargs]
    plain += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return " ".join(plain)


def megatron_parser() -> argparse.ArgumentParser:
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
