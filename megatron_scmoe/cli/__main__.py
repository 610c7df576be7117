"""``python -m megatron_scmoe.cli``: the program ``scmoe``, in the form that torchrun starts."""

from megatron_scmoe.cli.program import main

main()
