"""A run resumed on other ranks, or for longer, goes on as if it had never stopped."""

import re

import pytest

from tests.distributed.test_training import NO_DROPOUT, TINY
from tests.harness import run_pretrain

FLAGS = [*TINY, *NO_DROPOUT]
FLAGS[FLAGS.index("--num-layers") + 1] = "4"
FLAGS[FLAGS.index("--moe-layer-freq") + 1] = "[0,1]*2"
STEPS = 6
LAYOUTS = {
    "EP2": (2, "--expert-model-parallel-size 2"),
    "1 rank": (1, "--expert-model-parallel-size 1"),
    "PP2": (2, "--expert-model-parallel-size 1 --pipeline-model-parallel-size 2"),
    "TP2": (2, "--expert-model-parallel-size 1 --tensor-model-parallel-size 2 --sequence-parallel"),
}
OPTIMIZERS = {
    "plain": [],
    "distributed, bf16": ["--use-distributed-optimizer", "--bf16"],
    "the embedding's own rate": ["--decoupled-lr", "3e-2"],
    "sgd": ["--optimizer", "sgd", "--sgd-momentum", "0.9"],
}


def train(layout: str, optimizer: str, *flags: str):
    ranks, of_layout = LAYOUTS[layout]
    words = [*FLAGS, "--train-iters", str(STEPS), *OPTIMIZERS[optimizer], *of_layout.split()]
    run = run_pretrain([*words, *flags], ranks)
    assert run.status == 0, run.output[-3000:]
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of an optimizer at EP2, with the checkpoints of steps 2, 4 and 6."""
    done = {}

    def of(optimizer: str):
        if optimizer not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            saving = ["--save", str(folder), "--save-interval", "2"]
            done[optimizer] = train("EP2", optimizer, *saving), folder
        return done[optimizer]

    return of


def assert_goes_on(run, straight, first: int, last: int = STEPS, within: float = 3e-5) -> None:
    """The printed losses and norms of the gradients are those of the run that was not stopped.

    But for the order of sums, which another layout changes: without the steps that Adam has counted,
    or its moments, a loss would be off by 3e-2.
    """
    assert sorted(run.losses) == list(range(first, last + 1))
    for step in range(first, last + 1):
        assert run.grad_norms[step] == pytest.approx(straight.grad_norms[step], abs=1e-2)
        assert run.losses[step] == pytest.approx(straight.losses[step], abs=within)


@pytest.mark.parametrize(
    "optimizer, layout",
    [("plain", "PP2"), ("distributed, bf16", "1 rank"), ("distributed, bf16", "TP2")],
)
def test_resume_on_another_layout(undisturbed, optimizer, layout):
    straight, folder = undisturbed(optimizer)
    run = train(layout, optimizer, "--load", str(folder), "--ckpt-step", "2")
    assert_goes_on(run, straight, 3, within=3e-5 if optimizer == "plain" else 1e-3)


def test_there_and_back(undisturbed, tmp_path):
    straight, folder = undisturbed("plain")
    there = [
        "--load",
        str(folder),
        "--ckpt-step",
        "2",
        "--save",
        str(tmp_path),
        "--save-interval",
        "2",
    ]
    assert_goes_on(train("1 rank", "plain", *there, "--exit-interval", "4"), straight, 3, 4)
    back = train("EP2", "plain", "--load", str(tmp_path), "--save", str(tmp_path))
    assert_goes_on(back, straight, 5)


def counted_in_samples() -> list[str]:
    """The flags without what is counted in iterations."""
    at = {i + n for i, flag in enumerate(FLAGS) if flag.startswith("--lr-") for n in (0, 1)}
    return [word for i, word in enumerate(FLAGS) if i not in at]


class TestSchedule:
    def resumed(self, undisturbed, *flags: str):
        _, folder = undisturbed("plain")
        ranks, layout = LAYOUTS["1 rank"]
        words = [*FLAGS, *layout.split(), "--load", str(folder), "--ckpt-step", "4"]
        return run_pretrain([*words, *flags], ranks)

    def test_more_steps_of_a_larger_batch(self, undisturbed):
        run = self.resumed(undisturbed, "--train-iters", "7", "--global-batch-size", "16")
        assert run.status == 0, run.output[-3000:]
        assert sorted(run.losses) == [5, 6, 7]
        assert "decay over 160 samples, not 80" in run.output
        # Four steps of 8 samples are done; from a peak of 1e-2 at 2 x 16 samples down to 0 at 160.
        rates = {step: 1e-2 * (160 - 32 - 16 * (step - 4)) / 128 for step in (5, 6, 7)}
        assert run.learning_rates == pytest.approx(rates)

    def test_samples_are_counted_from_what_is_done(self, undisturbed, monkeypatch):
        monkeypatch.setitem(globals(), "FLAGS", counted_in_samples())
        run = self.resumed(undisturbed, "--train-samples", "64", "--global-batch-size", "16")
        assert run.status == 0, run.output[-3000:]
        assert sorted(run.losses) == [5, 6]  # 4 of 8 are done; 64 / 16 are 4

    def test_another_learning_rate_only_if_asked(self, undisturbed):
        refused = self.resumed(undisturbed, "--train-iters", "6", "--lr", "5e-3")
        assert refused.status == 2
        assert refused.error.startswith("--lr 0.005: ")
        asked = ["--train-iters", "6", "--lr", "5e-3", "--override-opt-param-scheduler"]
        run = self.resumed(undisturbed, *asked)
        assert run.status == 0, run.output[-3000:]
        straight, _ = undisturbed("plain")
        assert run.losses[5] == pytest.approx(straight.losses[5], abs=3e-5)
        for step, rate in run.learning_rates.items():
            assert rate == pytest.approx(straight.learning_rates[step] / 2)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_the_checkpoints_learning_rate_is_kept_if_asked(self, undisturbed, optimizer):
        straight, folder = undisturbed(optimizer)
        load = ["--load", str(folder), "--ckpt-step", "4", "--lr", "5e-3"]
        run = train("1 rank", optimizer, *load, "--use-checkpoint-opt-param-scheduler")
        for step in (5, 6):
            assert run.losses[step] == pytest.approx(straight.losses[step], abs=1e-3)
        rates = {step: straight.learning_rates[step] for step in (5, 6)}
        assert run.learning_rates == pytest.approx(rates)


def test_the_embedding_may_get_a_rate_of_its_own(undisturbed):
    straight, folder = undisturbed("plain")
    own = OPTIMIZERS["the embedding's own rate"]
    run = train("1 rank", "plain", "--load", str(folder), "--ckpt-step", "4", *own)
    assert run.losses[5] == pytest.approx(straight.losses[5], abs=3e-5)
    assert abs(run.losses[6] - straight.losses[6]) > 1e-2


def test_a_loss_scale_that_stood_may_move(tmp_path):
    saving = ["--save", str(tmp_path), "--save-interval", "4"]
    straight = train("1 rank", "plain", "--fp16", "--loss-scale", "1024", *saving)
    scale = ["--fp16", "--initial-loss-scale", "1024"]
    run = train("1 rank", "plain", *scale, "--load", str(tmp_path), "--ckpt-step", "4")
    assert run.losses == {step: straight.losses[step] for step in (5, 6)}


def test_another_model_is_refused_before_anything_is_started(undisturbed, tmp_path):
    _, folder = undisturbed("plain")
    words = [*FLAGS, *LAYOUTS["1 rank"][1].split(), "--train-iters", "6", "--load", str(folder)]
    run = run_pretrain([*words, "--scmoe-tap", "pos3"])
    assert run.status == 2
    assert "Traceback" not in run.output
    assert run.error.startswith("--scmoe-tap pos3: ")
    assert "was trained with --scmoe-tap pos2" in run.error


@pytest.mark.parametrize(
    ("layout", "flag", "value", "told"),
    [
        ("1 rank", "num-experts", "8", r"mlp.router.weight is of \(4, 32\) in .* of \(8, 32\) in"),
        ("PP2", "scmoe-combine", "cg2", "has no decoder.layers.1.mlp.combine_gate.weight, which "),
        ("1 rank", "num-layers", "8", "--num-layers 8: .* trained with --num-layers 4, and Mega"),
    ],
)
def test_another_model_on_purpose_has_the_tensors_of_this_one(
    undisturbed, layout, flag, value, told
):
    _, folder = undisturbed("plain")
    ranks, of_layout = LAYOUTS[layout]
    changed = [f"--{flag}", value, "--scmoe-changed", flag, "moe-layer-freq"]
    pattern = ["--moe-layer-freq", "[0,1]*4"] if flag == "num-layers" else []
    load = ["--train-iters", "6", "--load", str(folder), "--ckpt-step", "4"]
    run = run_pretrain([*FLAGS, *of_layout.split(), *load, *changed, *pattern], ranks)
    assert run.status == 2 and "Traceback" not in run.output, run.output[-3000:]
    assert re.search(told, run.error)


def test_what_is_given_beside_use_checkpoint_args_and_loses_is_named(undisturbed):
    straight, folder = undisturbed("plain")
    ranks, layout = LAYOUTS["1 rank"]
    load = ["--load", str(folder), "--ckpt-step", "4", "--use-checkpoint-args"]
    other = "--tokenizer-type HuggingFaceTokenizer --scmoe-tap pos1 --hidden-dropout 0.2".split()
    run = run_pretrain([*FLAGS, *layout.split(), "--train-iters", "6", *load, *other], ranks)
    assert run.status == 0, run.output[-3000:]
    given = [line.split(" is used: ")[0] for line in run.output.splitlines() if "was given" in line]
    assert sorted(given) == [
        "WARNING: --hidden-dropout 0.2 was given, and --hidden-dropout 0.0",
        "WARNING: --scmoe-tap pos1 was given, and --scmoe-tap pos2",
        "WARNING: --tokenizer-type HuggingFaceTokenizer was given, and --tokenizer-type NullTokenizer",
    ]
    assert run.losses[5] == pytest.approx(straight.losses[5], abs=3e-5)
