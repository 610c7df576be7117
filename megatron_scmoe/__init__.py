"""ScMoE, shortcut-connected mixture of experts, as an extension of Megatron-Core."""

__version__ = "0.1.0"
