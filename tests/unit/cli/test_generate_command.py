"""Prompts that the model cannot read are refused before it computes."""

from argparse import Namespace

import pytest

from megatron_scmoe.cli.generate import check_prompts
from megatron_scmoe.platform.command_line import UsageError

FLAGS = Namespace(
    load="checkpoints",
    prompts=["a"],
    num_tokens_to_generate=2,
    top_k=1,
    top_n_logprobs=0,
    termination_id=None,
)
SAVED = Namespace(max_position_embeddings=8, moe_expert_capacity_factor=None)


def test_a_tokenizer_of_another_model():
    check_prompts(FLAGS, [[3], [99, 5]], 100, SAVED)
    with pytest.raises(UsageError) as refused:
        check_prompts(FLAGS, [[3], [100, 5]], 100, SAVED)
    assert str(refused.value) == (
        "--prompts: the tokenizer makes id 100 of prompt 2, and the model has 100 tokens; accepted is "
        "--tokenizer-model with the one it was trained with"
    )
