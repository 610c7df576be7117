"""What flags ask for; prompts that the model cannot read are refused before it computes."""

from argparse import Namespace

import pytest

from megatron_scmoe.cli import generate
from megatron_scmoe.cli.generate import check_prompts
from megatron_scmoe.platform.command_line import UsageError
from tests.tools import pipe

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


@pytest.fixture
def asked(monkeypatch):
    """Call the command; return its flags, and the prompts, without generating."""
    monkeypatch.setattr(generate, "quiet_imports", lambda: None)
    monkeypatch.setattr(generate, "generate", lambda args, prompts: found.extend([args, prompts]))
    found: list = []

    def call(*flags, prompts=("--prompts", "a")) -> list:
        found.clear()
        generate.main(["--load", "checkpoints", *map(str, (*prompts, *flags))])
        return found

    return call


LIKELIEST, ALL = (1.0, 1, 0.0), (1.0, 0, 0.0)
"""Temperature, top-k and top-p of the likeliest token, and of one among all."""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), LIKELIEST),
        (("--temperature", 1.0), ALL),
        (("--temperature", 0.5), (0.5, 0, 0.0)),
        (("--top_p", 0), ALL),
        (("--top_p", 1), ALL),
        (("--top_p", 0.5), (1.0, 0, 0.5)),
        (("--top_k", 5), (1.0, 5, 0.0)),
        (("--top_k", 5, "--top_p", 1.0), (1.0, 5, 0.0)),
        (("--top_k", 1, "--temperature", 0.5), (0.5, 1, 0.0)),
    ],
)
def test_any_flag_of_sampling_samples_but_top_k_1(flags, expected, asked):
    args, _ = asked(*flags)
    assert (args.temperature, args.top_k, args.top_p) == expected
    assert args.seed == 0


def test_a_seed_goes_with_sampling(asked):
    assert asked("--temperature", 1, "--seed", 5)[0].seed == 5
    assert asked("--top_k", 2, "--seed", 5)[0].seed == 5


@pytest.mark.parametrize("greedy", [(), ("--top_k", 1), ("--top_k", 1, "--temperature", 0.5)])
def test_a_seed_of_nothing_is_refused(greedy, asked):
    with pytest.raises(UsageError) as refused:
        asked(*greedy, "--seed", 5)
    assert str(refused.value) == (
        f"--seed 5{' with --top_k 1' if greedy else ''}: the likeliest token is taken, and none is "
        "drawn; accepted with --temperature, --top_p, or --top_k other than 1"
    )


def test_prompts_may_come_from_a_pipe_to_one_process(asked, monkeypatch):
    with pipe(b'{"text": "a"}\n{"text": "b"}\n') as file:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError) as refused:
            asked(prompts=("--prompt-file", file))
        assert str(refused.value) == (
            f"--prompt-file {file}: a pipe, which one process can read, and here are 2 ranks; "
            "accepted is a file"
        )
        monkeypatch.delenv("WORLD_SIZE")
        assert asked(prompts=("--prompt-file", file))[1] == ["a", "b"]


def test_prompts_are_not_written_over(asked, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=f"--output-path {file}: it is what is read; accepted is"):
        asked("--output-path", file, "--force", prompts=("--prompt-file", file))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("absent", "there is no such file"),
        ("/dev/null", "a device, no file; accepted is a file or a pipe"),
        ("/", "this is a folder; accepted is a file"),
    ],
)
def test_what_is_no_file_of_prompts(file, told, asked):
    with pytest.raises(UsageError) as refused:
        asked(prompts=("--prompt-file", file))
    assert str(refused.value) == f"--prompt-file {file}: {told}"
