"""Loss, perplexity and logits of a checkpoint, on any layout of ranks, or of a Hugging Face model.

The model is built from the arguments that Megatron saved with the checkpoint, all of them:
``--use-checkpoint-args`` leaves out some that change the result, as the epsilon of the norms. Only what
says how the work is spread over ranks and kernels is set anew.
"""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.module import Float16Module
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor
from tqdm import tqdm

from megatron_scmoe import compat, cpu, preflight
from megatron_scmoe.arguments import (
    add_scmoe_args,
    scmoe_config_from_args,
    scmoe_config_from_environment,
)
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.preflight import PreflightError
from megatron_scmoe.spec import build_block_spec

NO_LABEL = -1
"""In labels: this position predicts nothing."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model; what is left over is data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Sequences:
    """What is evaluated: tokens and the label of each, int64 [n, s]; NO_LABEL where there is none."""

    tokens: np.ndarray
    labels: np.ndarray

    @staticmethod
    def from_stream(ids: np.ndarray, length: int) -> "Sequences":
        """Cut one stream of ids into rows of ``length``; the label of a token is the one after it.

        The last row is filled up with id 0, behind all that counts.
        """
        rows = max(1, math.ceil((len(ids) - 1) / length))
        tokens = np.zeros(rows * length, dtype=np.int64)
        labels = np.full(rows * length, NO_LABEL, dtype=np.int64)
        tokens[: len(ids)] = ids[: rows * length]
        labels[: len(ids) - 1] = ids[1 : rows * length + 1]
        return Sequences(tokens.reshape(rows, length), labels.reshape(rows, length))

    @staticmethod
    def from_rows(rows: np.ndarray) -> "Sequences":
        """Rows that stand for themselves, [n, s]: the last token of each has no label."""
        labels = np.full(rows.shape, NO_LABEL, dtype=np.int64)
        labels[:, :-1] = rows[:, 1:]
        return Sequences(rows.astype(np.int64), labels)

    def first(self, count: int) -> "Sequences":
        """The first ``count`` rows."""
        return Sequences(self.tokens[:count], self.labels[:count])

    def check(self, given: str, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary, with a :class:`PreflightError` that names ``given``."""
        low, high = int(self.tokens.min()), int(max(self.tokens.max(), self.labels.max()))
        if low < 0 or high >= vocab_size:
            raise PreflightError(
                given,
                f"it has the id {low if low < 0 else high}",
                f"ids from 0 to {vocab_size - 1}, the vocabulary of the model",
            )


@dataclass(frozen=True)
class Report:
    """The outcome.

    ``loss`` is the mean cross entropy in nats of ``tokens`` labels, with the vocabulary's entries in
    the softmax. ``padded_loss`` has the entries that pad Megatron's vocabulary in it as well, as the
    loss of training does; None if there are none.
    """

    loss: float
    tokens: int
    sequences: int
    padded_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


class Checkpoint:
    """A Megatron torch_dist checkpoint and the arguments it was saved with.

    Args:
        folder: what ``--load`` names.
        step: the iteration in it; None for the last one.

    Raises:
        PreflightError: if there is none, it is not complete, or it names no arguments.
    """

    def __init__(self, folder: str, step: int | None = None):
        self.given = f"--load {folder}"
        self.folder = folder
        self.step = step
        self.path = preflight.find_checkpoint("--load", folder, step)
        try:
            self._common = dist_checkpointing.load_common_state_dict(str(self.path))
        except Exception as error:  # its readers raise what they like
            raise PreflightError(
                self.given, f"{self.path} cannot be read ({error})", "a torch_dist checkpoint"
            ) from error
        if "args" not in self._common:
            raise PreflightError(
                self.given, f"{self.path} holds no arguments", "a checkpoint that training wrote"
            )
        parser = add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        defaults = vars(parser.parse_args([]))  # of what later versions have added
        self.args = argparse.Namespace(**defaults | vars(self._common["args"]))

    @property
    def scmoe(self) -> ScMoEConfig | None:
        """The configuration of ScMoE; None for a stock Megatron model."""
        saved = self._common["args"]
        if hasattr(saved, "scmoe_tap"):
            return scmoe_config_from_args(self.args)
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
            PreflightError: if a tensor of either is missing in the other or has another shape.
        """
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=self._common) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sharded = model.sharded_state_dict(metadata=metadata)
        self._check_shapes(sharded)
        # What Megatron calls missing is in the checkpoint and not asked for.
        state, left_over, absent = dist_checkpointing.load(
            sharded, str(self.path), strict=StrictHandling.RETURN_ALL
        )
        left_over = [key for key in left_over if key.startswith(_OF_THE_MODEL)]
        for keys, flaw in ((absent, "lacks"), (left_over, "has a tensor of no use here,")):
            keys = sorted(key for key in keys if "_extra_state" not in key)
            if keys:
                raise PreflightError(
                    self.given,
                    f"{self.path} {flaw} {keys[0]} ({len(keys)} in all)",
                    "a checkpoint whose arguments describe its tensors",
                )
        model.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)

    def _check_shapes(self, sharded: dict) -> None:
        stored = dist_checkpointing.load_tensors_metadata(str(self.path))
        for tensor in sharded.values():
            if isinstance(tensor, ShardedObject) or getattr(tensor, "allow_shape_mismatch", False):
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

    Raises:
        PreflightError: if it cannot be loaded.
    """
    args = argparse.Namespace(**vars(checkpoint.args))
    args.tokenizer_model = model or args.tokenizer_model
    args.pad_vocab_size = False
    try:
        return build_tokenizer(args)
    except Exception as error:  # its library may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
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
        PreflightError, ScMoEConfigError, ValueError, AssertionError: if checkpoint and layout do
            not go together.
    """
    args = _settings(checkpoint, layout, dtype)
    config = compat.transformer_config(args)
    model_config = compat.gpt_config(args, config)
    scmoe = checkpoint.scmoe
    if scmoe is not None:
        keys = compat.has_local_norm_keys(checkpoint.folder, checkpoint.step)
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


def evaluate(
    model,
    sequences: Sequences,
    vocab_size: int,
    micro_batch: int = 1,
    logits_out: Path | None = None,
) -> Report:
    """Evaluate this rank's part of a model together with all other ranks.

    Args:
        model: what :func:`build_model` returned.
        vocab_size: number of entries of the vocabulary, without the padding.
        micro_batch: rows computed at once; the data-parallel ranks take turns.
        logits_out: where the logits go, float32 [n, s, vocab_size]; written whole or not at all.
    """
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    own = _batches(sequences, micro_batch, ranks)[rank::ranks]
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    writes = is_last and rank == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    totals = torch.zeros(3, dtype=torch.float64).cuda()  # loss, loss with padding, labels
    shape = (*sequences.tokens.shape, vocab_size)
    target = _logits_file(logits_out, shape) if writes and logits_out else nullcontext()
    with (
        target as file,
        tqdm(total=len(sequences.tokens), unit=" seq", disable=_quiet(writes)) as bar,
    ):

        def score(batch, output, non_loss_data=True):
            """Of one micro-batch: output is [b, s, v / TP]."""
            labels = torch.from_numpy(batch.labels).cuda()
            counts = labels != NO_LABEL
            for index, size in enumerate((vocab_size, None)):
                losses = _cross_entropy(output, labels.clamp(min=0), size)
                totals[index] += (losses * counts)[: batch.count].double().sum()
            totals[2] += counts[: batch.count].sum()
            if logits_out is not None:
                logits = tensor_parallel.gather_from_tensor_model_parallel_region(output.float())
                for start, count, rows in _gather_rows(batch, logits[..., :vocab_size]):
                    if file is not None:
                        file[start : start + count] = rows[:count].cpu().numpy()
            bar.update(batch.count * ranks)

        def step(iterator, model):
            batch = next(iterator)
            tokens = torch.from_numpy(batch.tokens).cuda()
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            return model(tokens, positions, None), partial(score, batch)

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(own),
                model=model,
                num_microbatches=len(own),
                seq_length=sequences.tokens.shape[1],
                micro_batch_size=micro_batch,
                forward_only=True,
                collect_non_loss_data=True,
            )
    if not is_last or parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()
    torch.distributed.all_reduce(totals)
    loss, padded, count = totals.tolist()
    padding = _padded_vocab_size(model) != vocab_size
    return Report(
        loss / count, int(count), len(sequences.tokens), padded / count if padding else None
    )


class HuggingFaceModel:
    """A Hugging Face folder, evaluated by transformers in this process.

    Args:
        folder: with config.json, weights and, for a text, tokenizer.
        trust_remote_code: whether code in the folder may run.

    Raises:
        PreflightError: here and in the methods, if transformers cannot load it.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False):
        from transformers import AutoConfig  # takes seconds, which --load need not wait for

        self.folder = folder
        self.trust = dict(trust_remote_code=trust_remote_code)
        if not os.path.isdir(folder):
            raise PreflightError(f"--hf {folder}", "there is no such folder", "a model folder")
        with self._errors():
            self.config = AutoConfig.from_pretrained(folder, **self.trust).get_text_config()

    @property
    def vocab_size(self) -> int:
        """Number of logits of a token."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens that a sequence can have by the configuration."""
        return getattr(self.config, "max_position_embeddings", 1 << 30)

    def tokenize(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [n]; no special tokens are added."""
        from transformers import AutoTokenizer

        with self._errors():
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.trust)
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    @torch.no_grad()
    def evaluate(
        self,
        sequences: Sequences,
        micro_batch: int = 1,
        logits_out: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Report:
        """As :func:`evaluate`; ``dtype`` None is that of the files."""
        from transformers import AutoModelForCausalLM

        with self._errors():
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype or "auto", **self.trust
            )
        device = "cpu" if cpu.is_enabled() else "cuda"
        model = model.to(device).eval()
        loss, count = 0.0, 0
        shape = (*sequences.tokens.shape, self.vocab_size)
        target = _logits_file(logits_out, shape) if logits_out else nullcontext()
        with target as file, tqdm(total=shape[0], unit=" seq", disable=None) as bar:
            for batch in _batches(sequences, micro_batch, 1):
                tokens = torch.from_numpy(batch.tokens[: batch.count]).to(device)
                labels = torch.from_numpy(batch.labels[: batch.count]).to(device)
                logits = model(tokens).logits.float()
                loss += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
                ).item()
                count += int((labels != NO_LABEL).sum())
                if file is not None:
                    file[batch.start : batch.start + batch.count] = logits.cpu().numpy()
                bar.update(batch.count)
        return Report(loss / count, count, shape[0])

    @contextmanager
    def _errors(self):
        try:
            yield
        except Exception as error:  # transformers raises what it likes
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise PreflightError(
                f"--hf {self.folder}",
                f"transformers cannot load it ({reason})",
                "a folder with config.json, weights and tokenizer; with code: --trust-remote-code",
            ) from error


_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How keys of weights begin; the others are the optimizer's and those of the loop."""


def _settings(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None):
    """The checkpoint's arguments with this run's layout and kernels."""
    args = argparse.Namespace(**vars(checkpoint.args))
    for name, value in _OF_THE_RUN.items():
        setattr(args, name, value)
    args.tensor_model_parallel_size = layout.tensor
    args.sequence_parallel = layout.tensor > 1
    args.pipeline_model_parallel_size = layout.pipeline
    args.expert_model_parallel_size = layout.expert
    # Megatron's default; experts with biases cannot be split.
    with_bias = args.num_experts and args.add_bias_linear
    args.expert_tensor_parallel_size = 1 if with_bias else layout.tensor
    args.rank = torch.distributed.get_rank()
    args.world_size = torch.distributed.get_world_size()
    if not HAVE_TE:
        args.transformer_impl = "local"
    if dtype is not None:
        args.params_dtype = dtype
        args.bf16, args.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    compat.leave_out_missing_fusions(args)
    _check_layout(checkpoint, layout, args)
    return args


_OF_THE_RUN = dict(
    tensor_parallel_num_weight_shards=None,
    expert_tensor_parallel_num_weight_shards=None,
    gtp_weight_remat_size=1,
    expert_gtp_weight_remat_size=1,
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
    cpu_offloading=False,
    cuda_graph_impl="none",
    moe_token_dispatcher_type="alltoall",
    moe_router_force_load_balancing=False,
    moe_shared_expert_overlap=False,
    overlap_moe_expert_parallel_comm=False,
    delay_wgrad_compute=False,
    perform_initialization=False,
)
"""Settings of the run that saved the checkpoint, as this one has them; none changes a result."""


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


@dataclass(frozen=True)
class _Batch:
    """``count`` rows from row ``start`` on, filled up to the size of a micro-batch."""

    start: int
    count: int
    tokens: np.ndarray
    labels: np.ndarray


def _batches(sequences: Sequences, size: int, ranks: int) -> list[_Batch]:
    """Micro-batches of equal size, as many for each rank; those that only fill up count no row."""
    total = len(sequences.tokens)
    batches = []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        batches.append(
            _Batch(start, min(size, total - start), sequences.tokens[rows], sequences.labels[rows])
        )
    while len(batches) % ranks:
        batches.append(replace(batches[-1], count=0))
    return batches


def _cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """Cross entropy [b, s] from logits [b, s, v / TP]; entries from ``vocab_size`` on left out."""
    # Megatron's order of dimensions; a copy, as its cross entropy works in place.
    logits = logits.float().transpose(0, 1).clone(memory_format=torch.contiguous_format)
    if vocab_size is not None:
        local = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * local
        logits[..., max(0, vocab_size - first) :] = -torch.inf
    labels = labels.transpose(0, 1).contiguous()
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels).transpose(0, 1)


def _gather_rows(batch: _Batch, logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First row, number of rows and logits of the micro-batches of all data-parallel ranks."""
    group = parallel_state.get_data_parallel_group()
    logits = logits.contiguous()
    place = torch.tensor([batch.start, batch.count]).to(logits.device)
    places = [torch.empty_like(place) for _ in range(group.size())]
    rows = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(places, place, group=group)
    torch.distributed.all_gather(rows, logits, group=group)
    for where, what in zip(places, rows):
        yield *where.tolist(), what


@contextmanager
def _logits_file(path: Path, shape: tuple[int, int, int]):
    """A float32 .npy file to fill in place, at ``path`` when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        yield file
        file.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _padded_vocab_size(model) -> int:
    return getattr(model, "module", model).vocab_size


def _quiet(shows: bool) -> bool | None:
    """What tqdm's ``disable`` takes: None shows the bar on a terminal."""
    return None if shows else True
