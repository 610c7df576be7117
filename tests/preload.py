"""Imported once by the fork server, so that the ranks of every test start with Megatron loaded."""

from megatron_scmoe import cpu

cpu.enable_if_no_gpu()

import megatron.training

import megatron_scmoe.spec
import megatron_scmoe.training  # noqa: F401
