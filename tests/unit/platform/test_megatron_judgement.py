"""What Megatron refuses is one line that speaks of flags, and nothing else is taken for it."""

from argparse import Namespace

import pytest

from megatron_scmoe.errors import SettingsError
from megatron_scmoe.platform.command_line import UsageError
from megatron_scmoe.platform.megatron_judgement import in_words_of_flags, judged_by_megatron

ARGS = Namespace(min_lr=1.0, lr=0.1, bf16=True, fp16=None, add_bias_linear=True, consumed=0)


@pytest.fixture
def told(tmp_path):
    """The words for an assertion that fails in a function with these variables."""

    def tell(assertion: str, **variables) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        lines = [f"def judge({', '.join(variables)}):", f"    assert {assertion}"]
        file.write_text("\n".join(lines))
        module = {"args": ARGS}
        exec(compile(file.read_text(), str(file), "exec"), module)
        with pytest.raises(AssertionError) as caught:
            module["judge"](**variables)
        return in_words_of_flags(caught.value)

    return tell


@pytest.mark.parametrize(
    ("assertion", "words"),
    [
        (
            "args.min_lr <= args.lr and not args.bf16 or args.fp16",
            "--min-lr 1.0, --lr 0.1, --bf16, no --fp16: it must hold that --min-lr <= --lr and "
            "(not --bf16) or --fp16",
        ),
        (
            "not args.add_bias_linear",
            "no --disable-bias-linear: it must hold that --disable-bias-linear",
        ),
        (
            "args.add_bias_linear and args.fp16",
            "no --disable-bias-linear, no --fp16: it must hold that not --disable-bias-linear and "
            "--fp16",
        ),
        (
            "args.consumed > args.lr",
            "--lr 0.1: it must hold that args.consumed > --lr",
        ),
    ],
)
def test_parsed_arguments_are_flags_with_their_values(assertion, words, told):
    assert told(assertion, args=ARGS) == words


def test_other_variables_of_that_name_are_left_as_they_are(told):
    of_a_class = Namespace(args=ARGS)
    assert told("self.args.lr is None", self=of_a_class) == "it must hold that self.args.lr is None"
    both = told("self.args.lr is None", self=of_a_class, args=ARGS)
    assert both == "it must hold that self.args.lr is None"
    assert told("args.lr is None") == "it must hold that args.lr is None"  # a global
    assert told("args is None", args=(1, 2)) == "it must hold that args is None"


def test_what_megatron_refuses_is_one_line():
    for refusal in (AssertionError("two\n  lines"), ValueError("two lines")):
        with pytest.raises(SettingsError, match=r"^two lines$"), judged_by_megatron():
            raise refusal


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "eval_global_batch_size (3) must be divisible by eval_micro_batch_size (2) * "
            "data_parallel_size",
            "--eval-global-batch-size (3) must be divisible by --eval-micro-batch-size (2) * "
            "data_parallel_size",
        ),
        ("add_bias_linear is set", "add_bias_linear is set"),  # its flag says the opposite
        ("no file /tmp/num_layers/x, num_layers.bin", "no file /tmp/num_layers/x, num_layers.bin"),
        ("num_layers() and other_num_layers", "num_layers() and other_num_layers"),
    ],
)
def test_names_of_arguments_in_a_message_are_flags(message, words):
    assert in_words_of_flags(ValueError(message)) == words


def test_own_words_are_kept_and_a_bug_stays_one():
    for error in (UsageError("own"), KeyError("bug"), TypeError("bug")):
        with pytest.raises(type(error)) as caught, judged_by_megatron():
            raise error
        assert caught.value is error
