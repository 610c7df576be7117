"""Padded experts in a decode: no sizes are exchanged, and the texts are those without padding."""

from pathlib import Path

import pytest
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.transformer.moe import token_dispatcher

from megatron_scmoe.config import AUTO, OFF, ON, SERIAL
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.inference import expert_padding, generation
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.inference.expert_padding import ExpertPadding
from megatron_scmoe.inference.offloading import OffloadSettings
from megatron_scmoe.training import load_model
from tests import checkpoints, text_models
from tests.distributed.test_offloading import build
from tests.harness import run_distributed

TOKENS = 6
PROMPTS = [(5, 9, 2, 7), (3, 4), (8, 8, 1)]
"""Not as many on one rank as on the other."""

KINDS = [
    text_models.TAPS_INPUT,
    "sigmoid, expert bias, groups",
    "biases, no shared expert, no positions",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank has seen of each kind of model, by the number of ranks that share its experts."""
    folder = tmp_path_factory.mktemp("models")
    text_models.save(folder, text_models.train_tokenizer(folder), *KINDS)
    return {ranks: run_distributed(_texts_of_all, ranks, str(folder)) for ranks in (1, 2)}


def _texts_of_all(folder: str) -> dict:
    found = {}
    for kind in KINDS:
        load = load_model.Checkpoint(f"{folder}/{kind}")
        ranks = load_model.torch.distributed.get_world_size()
        model = load_model.build_model(load, load_model.Layout(expert=ranks))
        for padding in (OFF, ON, AUTO):
            found[kind, padding] = _texts(model, padding)
        found[kind, "exact again"] = _texts(model, OFF)
        found[kind, "most"] = [ExpertPadding(model, AUTO).applies(n) for n in (1, 32, 33, 64, 65)]
    return found


def _texts(model, padding: str) -> tuple[list[list[int]], list[float], int]:
    """Tokens, all log-probabilities, and how often sizes were exchanged."""
    exchanged = 0
    plain = token_dispatcher.gather_from_sequence_parallel_region

    def counted(*args, **kwargs):
        nonlocal exchanged
        exchanged += 1
        return plain(*args, **kwargs)

    token_dispatcher.gather_from_sequence_parallel_region = counted
    try:
        sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1, return_log_probs=True)
        texts = generation.generate(
            model,
            PROMPTS,
            sampling,
            text_models.VOCAB,
            micro_batch=2,
            decode=Decode(model, SERIAL, padding),
        )
    finally:
        token_dispatcher.gather_from_sequence_parallel_region = plain
    numbers = [number for text in texts for number in text.log_probs + text.prompt_log_probs]
    return [text.tokens for text in texts], numbers, exchanged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_changes_no_bit_on_a_cpu(found, ranks, kind):
    for row in found[ranks]:
        for padding in (ON, "exact again"):
            assert row[kind, padding][:2] == row[kind, OFF][:2]


def test_a_padded_decode_exchanges_no_sizes(found):
    for row in found[2]:
        for kind in KINDS:
            _, _, in_prefill = row[kind, ON]
            _, _, in_all = row[kind, OFF]
            assert 0 < in_prefill < in_all
            assert row[kind, AUTO] == row[kind, ON]


def test_auto_pads_a_few_tokens_of_ranks_that_share_experts(found):
    assert expert_padding.MOST_ROWS == 256
    for row in found[2]:
        assert row[text_models.TAPS_INPUT, "most"] == [True, True, True, True, False]  # 4 experts
        assert row["sigmoid, expert bias, groups", "most"] == [True, True, False, False, False]
    for row in found[1]:  # nobody to wait for
        assert row[text_models.TAPS_INPUT, AUTO] == row[text_models.TAPS_INPUT, OFF]
        assert not any(row[text_models.TAPS_INPUT, "most"])


def test_on_is_refused_where_experts_cannot_be_padded(tmp_path):
    (refused,) = run_distributed(_refusals, 1)
    assert refused == [
        "--decode-padding on: the model has --scmoe-chunks 2; accepted: auto, off",
        "--decode-padding on: the model's --moe-token-dispatcher-type allgather has no padding; "
        "accepted: auto, off",
    ]
    run_distributed(checkpoints.save_all, 2, str(tmp_path), "EP2", ["pos2"])
    found = run_distributed(_offloaded_refusals, 2, tmp_path)
    assert (
        found
        == [
            "--decode-padding on: of --offload-experts ranks would fetch those that only pad for other "
            "ranks; accepted: auto, off"
        ]
        * 2
    )


def _refusals() -> list[str]:
    checkpoints.models.init_parallel()
    return [
        _refusal(checkpoints.build(checkpoints.arguments("pos2", *flags.split())))
        for flags in (
            "--scmoe-chunks 2",
            "--moe-token-dispatcher-type allgather --no-scmoe-overlap",
        )
    ]


def _offloaded_refusals(folder: Path) -> str:
    settings = OffloadSettings(folder=folder / "experts")
    return _refusal(build(folder / "pos2", settings, expert=2)[0])


def _refusal(model) -> str:
    for in_graphs in (False, True):
        assert not ExpertPadding(model, AUTO).applies(1, in_graphs)
    with pytest.raises(ScMoEConfigError) as refusal:
        Decode(model, AUTO, ON)
    return str(refusal.value)
