"""A model with Megatron's key-value cache: it reads tokens, and gives the logits behind them."""

from megatron.core.inference.communication_utils import broadcast_from_last_pipeline_stage
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.transformer import utils
from torch import Tensor

from megatron_scmoe.inference.decode_graphs import CaptureError, DecodeGraphs
from megatron_scmoe.inference.decode_schedule import Decode


class CachedModel:
    """This rank's part of a model, and a cache of ``rows`` sequences of ``columns`` tokens.

    Args:
        model: what :func:`~megatron_scmoe.training.load_model.build_model` returned. Its sequence
            parallelism is switched off for good: one token has no parts to share out.
        decode: what schedule tokens have that :meth:`decode` reads.
    """

    def __init__(self, model, rows: int, columns: int, decode: Decode):
        self._decode = decode
        self.module = getattr(model, "module", model)
        if self.module.config.sequence_parallel:
            utils._sequence_parallel_attr_cache = None  # has models by address: of gone ones, too
            utils.set_model_to_sequence_parallel(self.module, False)
            utils._sequence_parallel_attr_cache = None  # else the model would stay for good
        self.context = StaticInferenceContext(rows, columns)
        self._wrapper = GPTInferenceWrapper(model, self.context)
        self._wrapper.prep_model_for_inference()
        self._graphs: DecodeGraphs | None = None

    def decode(
        self,
        texts: int,
        tokens: Tensor,
        positions: Tensor,
        *,
        column: int = 0,
        mask: Tensor | None = None,
        alike: bool = True,
        from_first: bool = False,
        **how,
    ) -> Tensor:
        """:meth:`read` one token of each row, as all ranks do with the ``texts`` they have together.

        Args:
            alike: whether all ranks have as many rows.
            from_first: whether all of them have theirs from the first row on, as graphs need it.
        """
        with self._decode.token(texts, len(tokens) if alike else None) as key:
            if key is None or not from_first:
                return self.read(tokens, positions, column=column, mask=mask, **how)
            if self._graphs is None:
                self._graphs = DecodeGraphs(self.module, self.context)
            try:
                logits, is_new = self._graphs.read(
                    self._forward, key, tokens, positions, column, mask
                )
            except CaptureError as error:
                self._graphs = None
                if not self._decode.goes_on_without_graphs(error):
                    raise
                return self.read(tokens, positions, column=column, mask=mask, **how)
            if is_new:
                self._decode.does_not_count()
            return logits.float().cpu()

    def drop_graphs(self) -> None:
        """Before NCCL ends, which waits for graphs that have its collectives."""
        self._graphs = None

    def read(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        row: int = 0,
        column: int = 0,
        mask: Tensor | None = None,
        last_only: bool = True,
    ) -> Tensor:
        """Read tokens into the cache, all ranks together.

        Args:
            tokens: int64 [b, n], for rows from ``row`` on and columns from ``column`` on.
            positions: of the tokens in their texts, int64 [b, n]; learned positions are taken from it.
            mask: bool [b or 1, 1, n, column + n], True where a token does not see a column; None for
                what is causal, and sees all columns before its own.
            last_only: give the logits behind the last column alone.

        Returns:
            Logits behind the columns, fp32 [b, n or 1, v], on every rank and on the host.
        """
        self.context.batch_size_offset, self.context.sequence_len_offset = row, column
        self.context.config.materialize_only_last_token_logits = last_only
        mask = None if mask is None else mask.cuda()
        logits = self._forward(tokens.cuda(), positions.cuda(), mask)
        if self._wrapper.model_is_pipeline_parallel:
            shape = [len(tokens), 1 if last_only else tokens.shape[1], self.module.vocab_size]
            logits = broadcast_from_last_pipeline_stage(
                shape, self._wrapper.config.params_dtype, logits, self._wrapper.pp_group
            )
        return logits.float().cpu()

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Of tensors on the device; graphs capture it."""
        return self._wrapper.run_one_forward_step(
            dict(tokens=tokens, position_ids=positions, attention_mask=mask)
        )
