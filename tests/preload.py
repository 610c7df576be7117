"""Imported once by the fork server, so that the ranks of every test start with Megatron loaded.

What every rank would do alike for itself is done here too: measured, a second of the three that a rank
takes for a run of a few steps.
"""

import functools
import gc
import warnings

from megatron_scmoe.platform import cpu_backend

cpu_backend.enable_if_no_gpu()
warnings.simplefilter("ignore")  # Megatron warns of what is not installed, on every rank


# What Megatron imports in the course of every run.
import megatron.core.datasets.helpers
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
import megatron.core.models.mimo.optimizer
import megatron.core.tokenizers.text.libraries.huggingface_tokenizer
import megatron.core.tokenizers.text.models  # noqa: F401
import torch._subclasses.schema_check_mode
import torch.utils.serialization  # noqa: F401
from megatron.training.argument_utils import ArgumentGroupFactory

import megatron_scmoe.spec
import megatron_scmoe.training.pretrain  # noqa: F401
from megatron_scmoe.validation.settings import names_of_settings

_read_docstrings = ArgumentGroupFactory._get_field_docstrings
_docstrings: dict[type, dict[str, str]] = {}


@functools.wraps(_read_docstrings)
def _known_docstrings(factory: ArgumentGroupFactory, kind: type) -> dict[str, str]:
    """The help of flags, which Megatron reads from its sources for every parser it makes."""
    if kind not in _docstrings:
        _docstrings[kind] = _read_docstrings(factory, kind)
    return dict(_docstrings[kind])


ArgumentGroupFactory._get_field_docstrings = _known_docstrings
names_of_settings()  # makes Megatron's parser
# A rank's collector need not look at what was made so far, nor copy the pages that it lies on.
gc.collect()
gc.freeze()
