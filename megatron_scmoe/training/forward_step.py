"""One micro-batch of training: its data, its forward, its loss."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_scmoe.training.iterations import Iterations

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
SPIKE = 10
"""A loss is spiky (``--check-for-spiky-loss``) from so many times the largest one of the start on."""

straggler_detector = StragglerDetector()  # Megatron's: one in a process


def forward_step(data_iterator, model, iterations: Iterations | None = None):
    """One micro-batch through the model.

    Args:
        iterations: is told of it.

    Returns:
        The loss of each token ([b, s], last stage) or the hidden states, and the loss function.
    """
    if iterations is not None:
        iterations.micro_batch_begins(is_training=model.training)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_detector(bdata=True):
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
            data_iterator, get_attr_wrapped_model(model, "vp_stage")
        )
    timers("batch-generator").stop()
    with straggler_detector:
        output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    # The last stage calls it, and has a mask.
    return output, partial(loss_function, loss_mask)  # type: ignore[arg-type]


def get_batch(data_iterator, vp_stage: int | None = None) -> tuple[Tensor | None, ...]:
    """This rank's part of the next micro-batch.

    Returns:
        tokens [b, s], labels [b, s], loss mask [b, s], attention mask [b, 1, s, s] or None, position
        ids [b, s]; all None on the middle stages of a pipeline. With context parallelism s is
        this rank's share.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * len(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) for key in BATCH_KEYS if key in data}
        batch.setdefault("attention_mask", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=True),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=True),
    )
    batch["cu_seqlens"] = None
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return tuple(batch.get(key) for key in BATCH_KEYS)


def loss_function(loss_mask: Tensor, output: Tensor):
    """Sum of the token losses.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output: [b, s], the cross entropy of each token in nats.

    Returns:
        The summed loss, the number of tokens counted, and both as ``lm loss`` for the log.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    _check_loss(report[0])  # a copy: the schedule scales the loss in place
    return loss, num_tokens, {"lm loss": report}


def _check_loss(loss: Tensor) -> None:
    """What ``--check-for-nan-in-loss-and-grad`` and ``--check-for-spiky-loss`` ask of it."""
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for reject, message in ((torch.isnan, "found NaN"), (torch.isinf, "found Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"{message} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(rerun.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
