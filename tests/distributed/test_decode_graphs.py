"""What a decode computes in CUDA graphs is what it computes without.

There is no graph on a CPU: here one is replayed by computing it again, with the same tensors. Real ones
are in tests/gpu/test_decode_graphs.py.
"""

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_scmoe.config import AUTO, OFF, ON, OVERLAPPED
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.inference import decode_graphs, generation, offloaded_experts, offloading
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.inference.slots import Slots, Text
from megatron_scmoe.training import load_model
from tests import checkpoints, text_models
from tests.distributed import test_expert_padding, test_offloading, test_slots
from tests.harness import run_distributed

KINDS = [text_models.TAPS_INPUT, text_models.LEARNED]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text_models.save(folder, text_models.train_tokenizer(folder), *KINDS)
    return folder


def captures() -> tuple[mock._patch, list]:
    """A stand-in for graphs, and what is called once for each of them."""
    captured = []

    def capture(run, pool):
        captured.append(run)
        return run

    patches = mock.patch.multiple(decode_graphs, can_capture=lambda: True, capture=capture)
    return patches, captured


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_write_the_texts_of_a_decode_without(models, kind, ranks):
    layout = load_model.Layout(expert=ranks)
    for without, within, graphs in run_distributed(_generate, ranks, str(models / kind), layout):
        assert graphs == 1  # of both rounds
        assert [text.tokens for text in within] == [text.tokens for text in without]
        for one, other in zip(within, without, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=test_slots.ROUNDING)


def _generate(load: str, layout: load_model.Layout | None, columns: int = 128) -> tuple:
    model = load_model.build_model(load_model.Checkpoint(load), layout or load_model.Layout())
    sampling = generation.SamplingParams(
        num_tokens_to_generate=test_expert_padding.TOKENS, top_k=1, return_log_probs=True
    )
    patches, captured = captures()
    texts = []
    with (
        patches,
        mock.patch.object(SelfAttention, "_allocate_memory", _full_of_nan),
        mock.patch.object(decode_graphs, "FEWEST_COLUMNS", columns),
    ):
        for graphs in (OFF, ON):
            texts.append(
                generation.generate(
                    model,
                    [(5, 9, 2, 7), (3, 4), (8, 8, 1), (6,)],
                    sampling,
                    text_models.VOCAB,
                    micro_batch=2 // torch.distributed.get_world_size(),
                    decode=Decode(model, OVERLAPPED, ON, graphs),
                )
            )
    return *texts, len(captured)


def _full_of_nan(attention, columns, rows, size, dtype) -> torch.Tensor:
    """As memory may be that nobody has written."""
    groups = attention.num_query_groups_per_partition
    return torch.full((columns, rows, groups, size), float("nan"), dtype=dtype)


@pytest.mark.parametrize("ranks, chunk", [(1, None), (1, 5), (2, None), (2, 3)])
def test_texts_join_and_leave_a_batch_in_graphs(models, expected, ranks, chunk):
    load = str(models / text_models.TAPS_INPUT)
    for found, graphs in run_distributed(_in_slots, ranks, load, chunk):
        assert graphs > 1
        test_slots.assert_same(found, expected)


@pytest.fixture(scope="module")
def expected(models) -> list[tuple]:
    """What is written behind each prompt alone."""
    (found,) = run_distributed(_one_by_one, 1, str(models / text_models.TAPS_INPUT))
    return found


def _one_by_one(load: str) -> list[tuple]:
    return test_slots._generate(*test_slots._model(load, load_model.Layout()))


def _in_slots(load: str, chunk: int | None) -> tuple[list[tuple], int]:
    ranks = torch.distributed.get_world_size()
    model, args = test_slots._model(load, load_model.Layout(expert=ranks))
    patches, captured = captures()
    with patches:
        found, _ = test_slots._join_and_leave(model, args, chunk, padding=ON, graphs=ON)
    return found, len(captured)


def test_a_prompt_that_is_half_read_stays_as_it_is_when_a_graph_is_captured(models):
    """It lies in columns that the texts which run have not come to."""
    load = str(models / text_models.TAPS_INPUT)
    (found,) = run_distributed(_beside_a_half_read_prompt, 1, load)
    assert found[ON] == found[OFF]


def _beside_a_half_read_prompt(load: str) -> dict[str, dict[int, list[int]]]:
    model, args = test_slots._model(load, load_model.Layout())
    found: dict[str, dict[int, list[int]]] = {}
    for graphs in (OFF, ON):
        with captures()[0]:
            slots = Slots(
                model, test_slots._vocabulary(args), 4, 32, padding=ON, chunk=5, graphs=graphs
            )
            joining = [Text(0, (3,)), Text(1, tuple(range(1, 13)))]
            texts: dict[int, list[int]] = {0: [], 1: []}
            for _ in range(14):
                for item in slots.step((), joining):
                    texts[item.key].append(item.place.token)
                joining = []
        found[graphs] = texts
    return found


@pytest.mark.parametrize("columns", [4, 8])
def test_graphs_of_more_columns_follow_as_the_texts_grow(models, columns):
    load = str(models / text_models.LEARNED)
    for without, within, graphs in run_distributed(_generate, 1, load, None, columns):
        assert [text.tokens for text in within] == [text.tokens for text in without]
        assert graphs > 1


@pytest.mark.parametrize("layers, captures_fail_from", [(None, 100), (1, 100), (None, 3)])
def test_of_offloaded_experts_those_alone_come_that_were_chosen(
    models, tmp_path, layers, captures_fail_from
):
    """Though padding sends every token to all of them; and whether or not each has a graph."""
    load = models / text_models.TAPS_INPUT
    settings = offloading.OffloadSettings(folder=tmp_path, layers=layers)
    (told,) = run_distributed(_offloaded, 1, load, settings, captures_fail_from)
    warned = told.count("warning: an expert could not be captured in a CUDA graph (out of memory)")
    assert warned == (captures_fail_from < 100)


def _offloaded(load: Path, settings: offloading.OffloadSettings, captures_fail_from: int) -> str:
    captured_experts = []

    def capture(run, pool):
        if len(captured_experts) == captures_fail_from:
            raise RuntimeError("out of memory")
        captured_experts.append(run)
        return run

    as_captured = mock.patch.multiple(offloaded_experts, is_capturing=lambda: True, capture=capture)
    told = io.StringIO()
    prompts = [[5, 9, 2, 7], [3, 4, 8, 1]]
    sampling = generation.SamplingParams(
        num_tokens_to_generate=test_expert_padding.TOKENS, top_k=1, return_log_probs=True
    )
    found = []
    for use in (OFF, AUTO):
        model, offload = test_offloading.build(load, settings, at_once=len(prompts))
        patches, captured = captures()
        with patches, as_captured, contextlib.redirect_stderr(told):
            decode = Decode(model, AUTO, AUTO, use)
            texts = generation.generate(
                model, prompts, sampling, text_models.VOCAB, decode=decode, micro_batch=2
            )
        assert len(captured) == (use == AUTO)
        assert bool(captured_experts) == (use == AUTO and captures_fail_from > 0)
        counts = offload.cache.counts
        found.append((texts, counts.uses, counts.hits, counts.copied_bytes))
    (without, *counts), (within, *counts_within) = found
    assert counts_within == counts
    for one, other in zip(within, without, strict=True):
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, abs=test_slots.ROUNDING)
    return told.getvalue()


@pytest.mark.parametrize("ranks, where", [(1, ""), (2, "rank 1: ")])
def test_a_decode_that_cannot_be_captured_goes_on_without_unless_it_was_asked_for(
    models, ranks, where
):
    """Of two ranks the second alone fails; both go on without, and the first one says so."""
    load = str(models / text_models.TAPS_INPUT)
    layout = load_model.Layout(expert=ranks)
    told = [
        "warning: a decode could not be captured in a CUDA graph, and goes on without "
        f"({where}operation not permitted); --decode-cuda-graphs on shows where"
    ]
    for rank, found in enumerate(run_distributed(_uncapturable, ranks, load, layout)):
        without, within, lines, error = found
        assert within == without
        assert lines == ([] if rank else told)
        assert error == f"{where}operation not permitted\nwhen stream is capturing"


def _uncapturable(load: str, layout: load_model.Layout) -> tuple:
    def capture(run, pool):
        run()
        if torch.distributed.get_rank() + 1 < torch.distributed.get_world_size():
            return run
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model = load_model.build_model(load_model.Checkpoint(load), layout)
    sampling = generation.SamplingParams(num_tokens_to_generate=5, top_k=1)
    texts, told = [], io.StringIO()

    def generate(use: str) -> list[list[int]]:
        decode = Decode(model, OVERLAPPED, ON, use)
        prompts = [(5, 9, 2, 7), (3, 4)]
        done = generation.generate(model, prompts, sampling, text_models.VOCAB, decode=decode)
        return [text.tokens for text in done]

    with captures()[0], mock.patch.object(decode_graphs, "capture", capture):
        with contextlib.redirect_stderr(told):
            texts = [generate(use) for use in (OFF, AUTO)]
        with pytest.raises(RuntimeError) as error:
            generate(ON)
    lines = [line for line in told.getvalue().splitlines() if line.startswith("warning: a decode")]
    return *texts, lines, str(error.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_graphs_are_taken_where_they_can_be(models, ranks):
    load = str(models / text_models.TAPS_INPUT)
    found = run_distributed(_in_graphs, ranks, load)
    assert found == [{OFF: False, AUTO: True, ON: True}] * ranks


def _in_graphs(load: str) -> dict[str, bool]:
    ranks = torch.distributed.get_world_size()
    model = load_model.build_model(load_model.Checkpoint(load), load_model.Layout(expert=ranks))
    with captures()[0]:
        return {use: Decode(model, AUTO, AUTO, use).in_graphs for use in (OFF, AUTO, ON)}


def test_on_is_refused_where_there_is_no_graph():
    (refused,) = run_distributed(_refusals, 1)
    given = "--decode-cuda-graphs on: "
    assert refused == [
        given + "it needs a GPU; accepted: auto, off",
        given + "with --decode-padding off the host waits for the experts' numbers of tokens; "
        "accepted: auto, off",
        given + "the model has --scmoe-chunks 2; accepted: auto, off",
    ]


def _refusals() -> list[str]:
    checkpoints.models.init_parallel()
    patches, _ = captures()
    refused = []
    with pytest.raises(ScMoEConfigError) as refusal:
        Decode(checkpoints.build(checkpoints.arguments("pos2")), AUTO, AUTO, ON)
    refused.append(str(refusal.value))
    with patches:
        for flags, padding in (([], OFF), (["--scmoe-chunks", "2"], AUTO)):
            model = checkpoints.build(checkpoints.arguments("pos2", *flags))
            Decode(model, AUTO, padding, AUTO)
            with pytest.raises(ScMoEConfigError) as refusal:
                Decode(model, AUTO, padding, ON)
            refused.append(str(refusal.value))
    return refused
