"""Weights in two formats as a table: which tensors of Megatron are which of Hugging Face, and how.

A format's file holds its tables, and a function that fills them in for a model:

    BLOCK = Table("decoder.layers.{block}.", "model.layers.{block}.", (
        Row("self_attention.linear_proj.*", {"self_attn.o_proj.*": "hidden queries"}, bias="biases"),
        Row("mlp.linear_fc1.*", {"mlp.gate_proj.*": "ffn hidden", "mlp.up_proj.*": "ffn hidden"},
            GATE_UP),
    ))
    sizes = dict(hidden=512, queries=512, ffn=2048, biases=False)
    mapping = ParamMapping(*(BLOCK.fill(sizes, block=i) for i in range(12)))
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, Tensors, check_tensors
from megatron_scmoe.checkpoints.parameter_transforms import SAME, Sizes, Transform

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron and what it is in Hugging Face's format, or so a weight and its bias.

    In names ``*`` stands for "weight", and for "bias" in models that have one: it has the weight's
    first dimension. ``{expert}`` stands for each expert in turn, other words in braces for the
    numbers that :meth:`Table.fill` is given.

    Args:
        megatron: the name in a Megatron checkpoint.
        hf: names in Hugging Face's format, and shapes in sizes of the model: "ffn hidden", "2 hidden".
        transform: how the one is made of the others.
        when: a size that is 0 or False in models without this tensor.
        bias: a size that is 0 or False in models without the bias; None if none has it.
    """

    megatron: str
    hf: Mapping[str, str]
    transform: Transform = SAME
    when: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one part of a model; ``megatron`` and ``hf`` are what their names begin with."""

    megatron: str
    hf: str
    rows: tuple[Row, ...]

    def fill(self, sizes: Sizes, **numbers: int) -> Iterator["Param"]:
        """The tensors of this part of a model.

        Args:
            sizes: of the model, by the words in the rows.
            numbers: what the words in braces stand for.
        """
        for row in self.rows:
            if row.when is None or sizes[row.when]:
                yield self._param(row, "weight", sizes, numbers)
                if row.bias is not None and sizes[row.bias]:
                    yield self._param(row, "bias", sizes, numbers)

    def _param(self, row: Row, kind: str, sizes: Sizes, numbers: Mapping[str, int]) -> "Param":
        of_experts = any("{expert}" in name for name in row.hf)
        hf = {}
        for expert in range(sizes["experts"] if of_experts else 1):
            for pattern, words in row.hf.items():
                shape = tuple(_size(word, sizes) for word in words.split())
                name = (self.hf + pattern).format(**numbers, expert=expert).replace("*", kind)
                hf[name] = shape[:1] if kind == "bias" else shape
        megatron = (self.megatron + row.megatron).format(**numbers).replace("*", kind)
        return Param(megatron, hf, row.transform, sizes)


@dataclass(frozen=True)
class Param:
    """A row filled in: Megatron's name, Hugging Face's names and shapes."""

    megatron: str
    hf: Mapping[str, Shape]
    transform: Transform
    sizes: Sizes

    def join(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """Megatron's tensor, from Hugging Face's."""
        return self.transform.join([tensors[name] for name in self.hf], self.sizes)

    def split(self, tensor: LazyTensor) -> Tensors:
        """Hugging Face's tensors, from Megatron's."""
        return dict(
            zip(self.hf, self.transform.split(tensor, len(self.hf), self.sizes), strict=True)
        )


class ParamMapping:
    """All tensors of a model, in both formats; each is used exactly once.

    Args:
        parts: of the model, tables filled in.
    """

    def __init__(self, *parts: Iterable[Param]):
        self.params = tuple(param for part in parts for param in part)

    @cached_property
    def hf_shapes(self) -> dict[str, Shape]:
        """Shapes by Hugging Face's names."""
        return {name: shape for param in self.params for name, shape in param.hf.items()}

    @cached_property
    def megatron_shapes(self) -> dict[str, Shape]:
        """Shapes by Megatron's names."""
        tensors = {
            name: LazyTensor(shape, torch.float32, _no_values)
            for name, shape in self.hf_shapes.items()
        }
        return {param.megatron: tuple(param.join(tensors).shape) for param in self.params}

    def to_megatron(self, tensors: Mapping[str, LazyTensor]) -> Tensors:
        """Megatron's tensors from Hugging Face's.

        Raises:
            ConversionError: if one is missing, left over or of another shape; it names the tensor.
        """
        check_tensors(tensors, self.hf_shapes, "config.json")
        return {param.megatron: param.join(tensors) for param in self.params}

    def to_hf(self, tensors: Mapping[str, LazyTensor]) -> Tensors:
        """Hugging Face's tensors from Megatron's.

        Raises:
            ConversionError: if one is missing, left over or of another shape; it names the tensor.
        """
        check_tensors(tensors, self.megatron_shapes, "the arguments")
        result: Tensors = {}
        for param in self.params:
            result |= param.split(tensors[param.megatron])
        return result


def _size(word: str, sizes: Sizes) -> int:
    return int(word) if word.isdigit() else sizes[word]


def _no_values(box):
    raise AssertionError("only shapes are wanted")
