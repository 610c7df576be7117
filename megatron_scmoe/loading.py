"""A checkpoint's model on the ranks at hand, whatever layout saved it.

The model is built from the arguments that Megatron saved with the checkpoint, all of them:
``--use-checkpoint-args`` leaves out some that change the result, as the epsilon of the norms. Only
what says how the work is spread over ranks and kernels is set anew.
"""

import argparse
import os
from dataclasses import dataclass, fields
from functools import partial

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.module import Float16Module
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelBuilder
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe import compat, preflight
from megatron_scmoe.arguments import (
    add_scmoe_args,
    scmoe_config_from_args,
    scmoe_config_from_environment,
)
from megatron_scmoe.checkpoints.lazy import ConversionError
from megatron_scmoe.checkpoints.torch_dist import only_safe_types, read_common
from megatron_scmoe.config import OF_THE_RUN, ScMoEConfig
from megatron_scmoe.errors import in_words, judged_by_megatron
from megatron_scmoe.preflight import PreflightError
from megatron_scmoe.spec import build_block_spec

NULL_TOKENIZER = "NullTokenizer"
"""Megatron's tokenizer type for ids that come from elsewhere; it reads no text."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model; what is left over is data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


class Checkpoint:
    """A Megatron torch_dist checkpoint and the arguments it was saved with; none of it is executed.

    Args:
        folder: what ``--load`` names: what was ``--save``, or an ``iter_...`` folder in it.
        step: the iteration in it; None for the last one, or the folder's own.

    Raises:
        PreflightError: if there is none, it is not complete, or it names no arguments.
    """

    def __init__(self, folder: str, step: int | None = None):
        self.given = f"--load {folder}"
        if not preflight.is_iteration(folder):
            self.path = preflight.find_checkpoint("--load", folder, step)
        elif step is None:
            self.path = preflight.check_iteration("--load", folder)
        else:
            raise PreflightError(
                f"--ckpt-step {step}", f"{folder} is one iteration already", "--load alone"
            )
        try:
            self._common = read_common(self.path)
        except ConversionError as error:
            raise PreflightError(
                self.given,
                f"{self.path} cannot be read ({in_words(error)})",
                "a torch_dist checkpoint",
            ) from error
        if "args" not in self._common:
            raise PreflightError(
                self.given, f"{self.path} holds no arguments", "a checkpoint that training wrote"
            )
        parser = add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        defaults = vars(parser.parse_args([]))  # of what later versions have added
        self.args = argparse.Namespace(**defaults | vars(self._common["args"]))

    def scmoe(self, settings: argparse.Namespace) -> ScMoEConfig | None:
        """The configuration of ScMoE in these settings; None for a stock Megatron model."""
        saved = self._common["args"]
        if hasattr(saved, "scmoe_tap"):
            return scmoe_config_from_args(settings)
        if (getattr(saved, "spec", None) or [""])[0] == "megatron_scmoe.spec":
            return scmoe_config_from_environment()
        return None

    def check_length(self, length: int, layout: Layout) -> None:
        """Refuse a sequence length that the model, or sequence parallelism, cannot have."""
        if length % layout.tensor:
            raise PreflightError(
                f"a sequence length of {length}",
                f"--tensor-model-parallel-size {layout.tensor} divides the sequence",
                f"a multiple of {layout.tensor}",
            )
        longest = self.args.max_position_embeddings
        if self.args.position_embedding_type == "learned_absolute" and length > longest:
            raise PreflightError(
                f"a sequence length of {length}",
                f"the model has {longest} learned positions",
                f"--sequence-length {longest} or less",
            )

    def load(self, model: torch.nn.Module) -> None:
        """Load the model's weights, whatever the layouts of both.

        Raises:
            PreflightError: if a tensor of either is missing in the other or has another shape, or
                it cannot be read.
        """
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=self._common) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sharded = model.sharded_state_dict(metadata=metadata)
        # Extra states are pickles, and of use to FP8 alone.
        _, sharded = extract_matching_values(
            sharded, lambda value: isinstance(value, ShardedObject)
        )
        self._check_shapes(sharded)
        # What Megatron calls missing is in the checkpoint and not asked for.
        try:
            with only_safe_types():
                state, left_over, absent = dist_checkpointing.load(
                    sharded, str(self.path), strict=StrictHandling.RETURN_ALL
                )
        except (Exception, CheckpointException) as error:  # its readers raise what they like
            raise PreflightError(
                self.given,
                f"a tensor in {self.path} cannot be read ({in_words(_cause(error))})",
                "a checkpoint whose files are whole",
            ) from error
        left_over = [key for key in left_over if key.startswith(_OF_THE_MODEL)]
        for keys, flaw in ((absent, "lacks"), (left_over, "has a tensor of no use here,")):
            keys = sorted(key for key in keys if "_extra_state" not in key)
            if keys:
                raise PreflightError(
                    self.given,
                    f"{self.path} {flaw} {keys[0]} ({len(keys)} in all)",
                    "a checkpoint whose arguments describe its tensors",
                )
        # The common state is in it too, under names that a checkpoint chooses.
        model.load_state_dict({key: state[key] for key in sharded if key in state}, strict=False)

    def _check_shapes(self, sharded: dict) -> None:
        stored = dist_checkpointing.load_tensors_metadata(str(self.path))
        for tensor in sharded.values():
            if getattr(tensor, "allow_shape_mismatch", False):
                continue
            found = stored.get(getattr(tensor, "key", None))
            if hasattr(tensor, "global_shape") and found is not None:
                shape, expected = tuple(found.global_shape), tuple(tensor.global_shape)
                if shape != expected:
                    raise PreflightError(
                        self.given,
                        f"{tensor.key} in {self.path} has the shape {shape}, and {expected} by the "
                        "checkpoint's arguments",
                        "a checkpoint whose arguments describe its tensors",
                    )


def tokenizer_of(checkpoint: Checkpoint, model: str | None = None):
    """Megatron's tokenizer of a checkpoint, or the one in ``model``, of the same type.

    NullTokenizer has no model: there ``model`` is a folder of Hugging Face or a SentencePiece model.

    Raises:
        PreflightError: if it cannot be loaded.
    """
    args = argparse.Namespace(**vars(checkpoint.args))
    args.tokenizer_model = model or args.tokenizer_model
    args.pad_vocab_size = False
    args.trust_remote_code = False
    if model is not None and args.tokenizer_type == NULL_TOKENIZER:
        folder = os.path.isdir(model)
        args.tokenizer_type = "HuggingFaceTokenizer" if folder else "SentencePieceTokenizer"
    try:
        return build_tokenizer(args)
    except Exception as error:  # its library may raise anything
        reason = in_words(error, lines=1)
        raise PreflightError(
            f"--tokenizer-model {args.tokenizer_model} ({args.tokenizer_type})",
            f"it cannot be loaded ({reason})",
            "the tokenizer that the model was trained with",
        ) from error


def build_model(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None = None):
    """This rank's part of the checkpoint's model, loaded and set to evaluate.

    ``torch.distributed`` must be initialised; Megatron's process groups are made here.

    Args:
        dtype: of the weights; None for that of the checkpoint's arguments.

    Raises:
        PreflightError, ScMoEConfigError, SettingsError: if checkpoint and layout do not go together.
    """
    args = _settings(checkpoint, layout, dtype)
    scmoe = checkpoint.scmoe(args)
    if scmoe is not None:
        args.spec = None
    elif args.spec and not args.spec[0].startswith("megatron.core."):
        raise PreflightError(
            f"{checkpoint.given} (--spec {' '.join(args.spec)})",
            "the checkpoint asks for code, and none that it names is run",
            "a model of ScMoE, or of Megatron's own",
        )
    with judged_by_megatron():
        config = compat.transformer_config(args)
        model_config = compat.gpt_config(args, config)
    if scmoe is not None:
        keys = compat.has_local_norm_keys_at(str(checkpoint.path))
        model_config.transformer_layer_spec = partial(
            _block_spec, scmoe=scmoe, local_norm_keys=keys
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(model_config).build_model(groups).cuda()
    checkpoint.load(model)
    if args.bf16 or args.fp16:
        model = Float16Module(config, model)
    return model.eval()


def settings_of_the_model(saved: argparse.Namespace) -> argparse.Namespace:
    """A copy of saved arguments: the model as saved, the run that of one rank and of the kernels here.

    What computes the same without Transformer Engine is computed without it, where there is none.
    """
    args = argparse.Namespace(**vars(saved))
    vars(args).update(_OF_THE_RUN)
    if not HAVE_TE:
        vars(args).update(_WITHOUT_TE)
    compat.leave_out_missing_fusions(args)
    return args


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that failed, where PyTorch wraps those of all."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return error


_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How keys of weights begin; the others are the optimizer's and those of the loop."""


def _settings(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None):
    """The checkpoint's arguments with this run's layout and kernels."""
    args = settings_of_the_model(checkpoint.args)
    args.tensor_model_parallel_size = layout.tensor
    # Megatron's MoE needs it; its own local norms refuse it.
    args.sequence_parallel = layout.tensor > 1 and (bool(args.num_experts) or HAVE_TE)
    args.pipeline_model_parallel_size = layout.pipeline
    args.expert_model_parallel_size = layout.expert
    # Megatron's default; experts with biases cannot be split.
    with_bias = args.num_experts and args.add_bias_linear
    args.expert_tensor_parallel_size = 1 if with_bias else layout.tensor
    args.rank = torch.distributed.get_rank()
    args.world_size = torch.distributed.get_world_size()
    if dtype is not None:
        args.params_dtype = dtype
        args.bf16, args.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    _check_layout(checkpoint, layout, args)
    return args


_OF_THE_RUN = dict(
    tensor_model_parallel_size=1,
    tensor_parallel_num_weight_shards=None,
    sequence_parallel=False,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=1,
    expert_tensor_parallel_num_weight_shards=None,
    gtp_weight_remat_size=1,
    expert_gtp_weight_remat_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    pipeline_model_parallel_layout=None,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    account_for_embedding_in_pipeline_split=False,
    account_for_loss_in_pipeline_split=False,
    context_parallel_size=1,
    hierarchical_context_parallel_sizes=None,
    overlap_p2p_comm=False,
    tp_comm_overlap=False,
    recompute_granularity=None,
    recompute_method=None,
    recompute_num_layers=None,
    recompute_modules=None,
    moe_layer_recompute=False,
    cpu_offloading=False,
    fine_grained_activation_offloading=False,
    moe_paged_stash=False,
    cuda_graph_impl="none",
    batch_invariant_mode=False,
    fp8=None,
    fp8_param_gather=False,
    fp8_output_proj=False,
    fp4=None,
    fp4_param_gather=False,
    moe_router_padding_for_fp8=False,
    moe_router_padding_for_quantization=False,
    moe_token_dispatcher_type="alltoall",
    moe_router_force_load_balancing=False,
    moe_shared_expert_overlap=False,
    overlap_moe_expert_parallel_comm=False,
    overlap_dispatch_backward_with_experts_wgrad=False,
    ep_overlap_early_attn_memory_release=False,
    delay_wgrad_compute=False,
    perform_initialization=False,
    no_persist_layer_norm=True,
    **{f"scmoe_{f.name}": f.default for f in fields(ScMoEConfig) if f.name in OF_THE_RUN},
)
"""Settings of the run that saved the checkpoint, as this one has them; no result changes but by
rounding, finer than with fp8 and fp4."""

_WITHOUT_TE = dict(transformer_impl="local", moe_permute_fusion=False, moe_router_fusion=False)


def _check_layout(checkpoint: Checkpoint, layout: Layout, args) -> None:
    """Refuse a layout that the model cannot be spread over."""
    world = args.world_size
    sizes = (
        (
            "--tensor-model-parallel-size",
            layout.tensor,
            args.num_attention_heads,
            "attention heads",
        ),
        (
            "--tensor-model-parallel-size",
            layout.tensor,
            args.padded_vocab_size,
            "vocabulary entries",
        ),
        ("--expert-model-parallel-size", layout.expert, args.num_experts or 1, "experts"),
        ("--pipeline-model-parallel-size", layout.pipeline, args.num_layers, "blocks"),
    )
    for flag, size, number, what in sizes:
        if size < 1 or number % size:
            raise PreflightError(
                f"{flag} {size}", f"the model has {number} {what}", f"a divisor of {number}"
            )
    dense = layout.tensor * layout.pipeline
    for size, flags in (
        (dense, "--tensor-model-parallel-size times --pipeline-model-parallel-size"),
        (
            dense * layout.expert,
            "the product of --tensor-, --pipeline- and --expert-model-parallel-size",
        ),
    ):
        if world % size:
            raise PreflightError(
                f"{flags} is {size}", f"there are {world} ranks", f"a multiple of {size} ranks"
            )


def _block_spec(model_config, vp_stage=None, *, scmoe: ScMoEConfig, local_norm_keys: bool):
    return build_block_spec(model_config.transformer, scmoe, vp_stage, local_norm_keys)
