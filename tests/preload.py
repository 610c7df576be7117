"""Imported once by the fork server, so that the ranks of every test start with Megatron loaded."""

import warnings

from megatron_scmoe import cpu

cpu.enable_if_no_gpu()
warnings.simplefilter("ignore")  # Megatron warns of what is not installed, on every rank


import megatron_scmoe.spec
import megatron_scmoe.training  # noqa: F401
