"""Imported once by the fork server, so that the ranks of every test start with Megatron loaded."""

import warnings

from megatron_scmoe.platform import cpu_backend

cpu_backend.enable_if_no_gpu()
warnings.simplefilter("ignore")  # Megatron warns of what is not installed, on every rank


import megatron.core.tokenizers.text.libraries.huggingface_tokenizer  # noqa: F401  every run's

import megatron_scmoe.spec
import megatron_scmoe.training.pretrain  # noqa: F401
