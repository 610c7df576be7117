"""A checkpoint's model on the ranks at hand, whatever layout saved it.

The model is built from the arguments that Megatron saved with the checkpoint, all of them:
``--use-checkpoint-args`` leaves out some that change the result, as the epsilon of the norms. Only
what says how the work is spread over ranks and kernels is set anew.
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.training.models.gpt import GPTModelBuilder
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.arguments import (
    ENVIRONMENT_VARIABLE,
    PREFIX,
    defaults,
    scmoe_config_from_args,
)
from megatron_scmoe.checkpoints import locate
from megatron_scmoe.checkpoints.local_norm_keys import has_local_norm_keys_at
from megatron_scmoe.checkpoints.model_arguments import built_by_spec, with_defaults
from megatron_scmoe.checkpoints.runtime_settings import settings_of_the_model
from megatron_scmoe.checkpoints.torch_dist import only_safe_types, read_common
from megatron_scmoe.checkpoints.vocabulary import check_tokenizer
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ConversionError, InputError, in_words
from megatron_scmoe.model.layer_spec import stage_spec
from megatron_scmoe.platform import megatron_workarounds
from megatron_scmoe.platform.megatron_judgement import judged_by_megatron

NULL_TOKENIZER = "NullTokenizer"
"""Megatron's tokenizer type for ids that come from elsewhere; it reads no text."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model; what is left over is data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


class ExpertsElsewhere(Protocol):
    """What keeps routed experts out of a model (inference/offloading.py)."""

    def replace_experts(self, spec, config, vp_stage: int | None):
        """The spec of a stage, changed."""

    def holds(self, key: str) -> bool:
        """Whether a tensor of the checkpoint is not to be loaded."""


class Checkpoint:
    """A Megatron torch_dist checkpoint and the arguments it was saved with; none of it is executed.

    Args:
        folder: what ``--load`` names: what was ``--save``, or an ``iter_...`` folder in it.
        step: the iteration in it; None for the last one, or the folder's own.
        given: what ``--load`` has named, if ``folder`` was made of it; for errors.

    Attributes:
        name: of the folder that holds the iterations.

    Raises:
        InputError: if there is none, it is not complete, or it names no arguments.
    """

    def __init__(self, folder: str, step: int | None = None, given: str | None = None):
        self.given = f"--load {given or folder}"
        self.name = Path(folder).resolve().name
        if not locate.is_iteration(folder):
            self.path = locate.find_checkpoint("--load", folder, step)
        elif step is None:
            self.path = locate.check_iteration("--load", folder)
            self.name = self.path.resolve().parent.name
        else:
            raise InputError(
                f"--ckpt-step {step}", f"{folder} is one iteration already", "--load alone"
            )
        try:
            self._common = read_common(self.path)
        except ConversionError as error:
            raise InputError(
                self.given,
                f"{self.path} cannot be read ({in_words(error)})",
                "a torch_dist checkpoint",
            ) from error
        if "args" not in self._common:
            raise InputError(
                self.given, f"{self.path} holds no arguments", "a checkpoint that training wrote"
            )
        self._saved = with_defaults(self._common["args"])
        self.args = argparse.Namespace(**defaults() | vars(self._saved))  # of later versions

    def scmoe(self, settings: argparse.Namespace) -> ScMoEConfig | None:
        """The configuration of ScMoE in these settings; None for a stock Megatron model.

        Raises:
            InputError: if an older version saved a ScMoE model without saying which.
        """
        if hasattr(self._saved, f"{PREFIX}tap"):
            return scmoe_config_from_args(settings)
        if built_by_spec(self._saved):
            raise InputError(
                self.given,
                f"an older version saved {self.path} under --spec without its --scmoe-* flags",
                f"{ENVIRONMENT_VARIABLE}='--scmoe-tap ...' in the environment, with those flags "
                "('' if there were none)",
            )
        return None

    def check_length(self, length: int, layout: Layout) -> None:
        """Refuse a sequence length that the model, or sequence parallelism, cannot have."""
        if length % layout.tensor:
            raise InputError(
                f"a sequence length of {length}",
                f"--tensor-model-parallel-size {layout.tensor} divides the sequence",
                f"a multiple of {layout.tensor}",
            )
        longest = self.args.max_position_embeddings
        if self.args.position_embedding_type == "learned_absolute" and length > longest:
            raise InputError(
                f"a sequence length of {length}",
                f"the model has {longest} learned positions",
                f"--sequence-length {longest} or less",
            )

    def load(self, model: MegatronModule, elsewhere: ExpertsElsewhere | None = None) -> None:
        """Load the model's weights, whatever the layouts of both.

        Args:
            elsewhere: what has those that the model lacks.

        Raises:
            InputError: if a tensor of either is missing in the other or has another shape, or
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
            raise InputError(
                self.given,
                f"a tensor in {self.path} cannot be read ({in_words(_cause(error))})",
                "a checkpoint whose files are whole",
            ) from error
        left_over = [
            key
            for key in left_over
            if key.startswith(_OF_THE_MODEL) and not (elsewhere and elsewhere.holds(key))
        ]
        for keys, flaw in ((absent, "lacks"), (left_over, "has a tensor of no use here,")):
            keys = sorted(key for key in keys if "_extra_state" not in key)
            if keys:
                raise InputError(
                    self.given,
                    f"{self.path} {flaw} {keys[0]} ({len(keys)} in all)",
                    "a checkpoint whose arguments describe its tensors",
                )
        # The common state is in it too, under names that a checkpoint chooses.
        model.load_state_dict({key: state[key] for key in sharded if key in state}, strict=False)

    def _check_shapes(self, sharded: dict) -> None:
        stored = dist_checkpointing.load_tensors_metadata(str(self.path))
        for tensor in sharded.values():  # Megatron itself lets the rows of the vocabulary differ
            found = stored.get(getattr(tensor, "key", None))
            if hasattr(tensor, "global_shape") and found is not None:
                shape, expected = tuple(found.global_shape), tuple(tensor.global_shape)
                if shape != expected:
                    raise InputError(
                        self.given,
                        f"{tensor.key} in {self.path} has the shape {shape}, and {expected} by the "
                        "checkpoint's arguments",
                        "a checkpoint whose arguments describe its tensors",
                    )


def tokenizer_of(
    checkpoint: Checkpoint, model: str | None = None, chat_template: str | None = None
):
    """Megatron's tokenizer of a checkpoint, or the one in ``model``, of the same type.

    NullTokenizer has no model: there ``model`` is a folder of Hugging Face or a SentencePiece model.

    Args:
        chat_template: in Jinja; None for the one that training or the tokenizer had, if any.

    Raises:
        InputError: if it cannot be loaded.
    """
    args = argparse.Namespace(**vars(checkpoint.args))
    args.tokenizer_model = model or args.tokenizer_model
    args.chat_template = chat_template or args.chat_template
    args.pad_vocab_size = False
    args.trust_remote_code = False
    if model is not None and args.tokenizer_type == NULL_TOKENIZER:
        folder = os.path.isdir(model)
        args.tokenizer_type = "HuggingFaceTokenizer" if folder else "SentencePieceTokenizer"
    try:
        tokenizer = build_tokenizer(args)
    except Exception as error:  # its library may raise anything
        reason = in_words(error, lines=1)
        raise InputError(
            f"--tokenizer-model {args.tokenizer_model} ({args.tokenizer_type})",
            f"it cannot be loaded ({reason})",
            "the tokenizer that the model was trained with",
        ) from error
    if model is not None:
        check_tokenizer(f"--tokenizer-model {model}", tokenizer.vocab_size, args)
    return tokenizer


def build_model(
    checkpoint: Checkpoint,
    layout: Layout,
    dtype: torch.dtype | None = None,
    *,
    local_attention: bool = False,
    elsewhere: ExpertsElsewhere | None = None,
):
    """This rank's part of the checkpoint's model, loaded and set to evaluate.

    ``torch.distributed`` must be initialised; Megatron's process groups are made here.

    Args:
        dtype: of the weights; None for that of the checkpoint's arguments.
        local_attention: build of Megatron's own modules, also where Transformer Engine is: their
            attention takes any mask with a key-value cache.
        elsewhere: what keeps experts of a ScMoE model out of it.

    Raises:
        InputError, ScMoEConfigError, SettingsError: if checkpoint and layout do not go together.
    """
    args = _settings(checkpoint, layout, dtype, local_attention)
    scmoe = checkpoint.scmoe(args)
    if scmoe is not None:
        args.spec = None
    elif args.spec and not args.spec[0].startswith("megatron.core."):
        raise InputError(
            f"{checkpoint.given} (--spec {' '.join(args.spec)})",
            "the checkpoint asks for code, and none that it names is run",
            "a model of ScMoE, or of Megatron's own",
        )
    with judged_by_megatron():
        config = megatron_workarounds.transformer_config(args)
        model_config = megatron_workarounds.gpt_config(args, config)
    if scmoe is not None:
        keys = has_local_norm_keys_at(str(checkpoint.path))
        spec = partial(stage_spec, scmoe=scmoe, local_norm_keys=keys)
        model_config.transformer_layer_spec = partial(_spec_without, elsewhere, spec)
    elif elsewhere is not None:
        raise InputError(
            f"--offload-experts with {checkpoint.given}",
            "it is a stock Megatron model, whose gate does not read a tap",
            "a ScMoE model",
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
    checkpoint.load(model, elsewhere)
    if args.bf16 or args.fp16:
        model = Float16Module(config, model)
    return model.eval()


def _spec_without(elsewhere: ExpertsElsewhere | None, spec, model_config, vp_stage=None):
    """The spec of a stage without the experts that are elsewhere."""
    stage = spec(model_config, vp_stage)
    if elsewhere is None:
        return stage
    return elsewhere.replace_experts(stage, model_config.transformer, vp_stage)


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that failed, where PyTorch wraps those of all."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return error


_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How keys of weights begin; the others are the optimizer's and those of the loop."""


def _settings(
    checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None, local_attention: bool
):
    """The checkpoint's arguments with this run's layout and kernels."""
    with_te = HAVE_TE and not local_attention
    args = settings_of_the_model(checkpoint.args, with_te)
    args.tensor_model_parallel_size = layout.tensor
    # Megatron's MoE needs it; its own local norms refuse it.
    args.sequence_parallel = layout.tensor > 1 and (bool(args.num_experts) or with_te)
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
    _check_layout(layout, args)
    return args


def _check_layout(layout: Layout, args) -> None:
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
            raise InputError(
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
            raise InputError(
                f"{flags} is {size}", f"there are {world} ranks", f"a multiple of {size} ranks"
            )
