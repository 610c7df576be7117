"""Texts that join and leave a batch at any token are those that `generate` writes on their own."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_scmoe.inference import generation
from megatron_scmoe.inference.offloading import ExpertOffload, OffloadSettings
from megatron_scmoe.inference.slots import Slots, Text
from megatron_scmoe.training import load_model
from tests import longcat, text_models
from tests.harness import run_distributed

SLOTS = 4

TOKENS = 9
"""Written behind each prompt; those of odd number end sooner."""

PROMPTS = [
    (5, 9, 2, 7, 11),
    (3,),
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    (8, 8),
    (21, 20, 19, 18, 17, 16, 15),
    (4, 6, 4, 6),
    (2,),
]

ROUNDING = 1e-5
"""fp32: sums over columns that a mask hides are grouped otherwise."""


MODELS = [text_models.TAPS_INPUT, text_models.LEARNED, "LongCat-Flash"]
LAYOUTS = {
    "TP2": (load_model.Layout(tensor=2), None),
    "PP2": (load_model.Layout(pipeline=2), None),
    "EP2 in chunks": (load_model.Layout(expert=2), 3),
}
"""And the tokens of a chunk. Whole prompts with EP2 are in tests/distributed/test_serving.py."""

CHUNKS = [1, 5, 64]
"""Tokens; the longest prompt has 12."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = text_models.train_tokenizer(folder)
    text_models.save(folder, tokenizer, text_models.TAPS_INPUT, text_models.LEARNED)
    longcat.build("zero experts", folder / "hf")
    longcat.import_folder(folder / "hf", folder / "LongCat-Flash")
    return folder


@pytest.fixture(scope="module")
def one_rank(checkpoints) -> dict[str, tuple]:
    """By model: texts that `generate` writes, those of a batch, and how they have joined it."""
    (found,) = run_distributed(_on_one_rank, 1, str(checkpoints))
    return found


def _on_one_rank(folder: str) -> dict[str, tuple]:
    found = {}
    for name in MODELS:
        model, args = _model(f"{folder}/{name}", load_model.Layout())
        chunked = {chunk: _join_and_leave(model, args, chunk)[0] for chunk in CHUNKS}
        found[name] = (_generate(model, args), *_join_and_leave(model, args), chunked)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_who_else_is_in_the_batch_changes_no_text(one_rank, model):
    expected, found, company, _ = one_rank[model]
    assert {"alone", "beside others"} <= company
    if model != "LongCat-Flash":  # its long texts wait until they are alone
        assert "longer than all others" in company
    assert_same(found, expected)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("model", MODELS)
def test_nor_do_prompts_that_are_read_in_chunks(one_rank, model, chunk):
    expected, _, _, chunked = one_rank[model]
    assert_same(chunked[chunk], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nor_does_the_layout(checkpoints, one_rank, layout):
    load = str(checkpoints / text_models.TAPS_INPUT)
    expected, *_ = one_rank[text_models.TAPS_INPUT]
    for found in run_distributed(_on_two_ranks, 2, load, *LAYOUTS[layout]):
        assert_same(found, expected)


def _on_two_ranks(load: str, layout: load_model.Layout, chunk: int | None) -> list[tuple]:
    found, _ = _join_and_leave(*_model(load, layout), chunk)
    return found


def test_a_long_prompt_does_not_stop_the_others_for_longer_than_a_chunk(checkpoints):
    """Two texts run when one of 12 tokens comes, and a short one behind it."""
    load = str(checkpoints / text_models.TAPS_INPUT)
    ((whole, in_chunks),) = run_distributed(_steps_beside_a_long_prompt, 1, load)
    everyone = ([0, 1, 2, 3], 4)
    assert whole == [([2, 3], 13), *[everyone] * 5]
    assert in_chunks == [([], 5), ([0, 1], 2), ([], 5), ([0, 1], 2), ([2, 3], 3), everyone]


def _steps_beside_a_long_prompt(load: str) -> list[list[tuple[list[int], int]]]:
    """Of each step the texts that get a token, and how many tokens the model reads."""
    model, args = _model(load, load_model.Layout())
    found = []
    for chunk in (None, 5):
        slots = Slots(model, _vocabulary(args), SLOTS, 32, chunk=chunk)
        for key in (0, 1):
            slots.step((), [Text(key, PROMPTS[key])])
            slots.step()
        sizes, steps = _watch_sizes(slots), []
        joining = [Text(2, PROMPTS[2]), Text(3, PROMPTS[6])]
        for _ in range(6):
            written = slots.step((), joining)
            steps.append((sorted(item.key for item in written), sum(sizes)))
            joining = []
            sizes.clear()
        found.append(steps)
    return found


def _watch_sizes(slots: Slots) -> list[int]:
    """Grows by the number of tokens with each forward."""
    sizes, read = [], slots._model.read

    def watched(tokens, *args, **how):
        sizes.append(tokens.numel())
        return read(tokens, *args, **how)

    slots._model.read = watched
    return sizes


def test_a_text_that_leaves_while_its_prompt_is_read_makes_room(checkpoints, one_rank):
    load = str(checkpoints / text_models.TAPS_INPUT)
    (found,) = run_distributed(_leave_while_reading, 1, load)
    expected = one_rank[text_models.TAPS_INPUT][0]
    assert found[4] == expected[4][0]
    assert found[0][:TOKENS] == expected[0][0]
    assert sorted(found) == [0, 4]


def _leave_while_reading(load: str) -> dict[int, list[int]]:
    """Two slots: one is taken, the other is given up for a third text after two chunks."""
    model, args = _model(load, load_model.Layout())
    slots = Slots(model, _vocabulary(args), 2, 32, chunk=2)
    texts = [Text(key, PROMPTS[key]) for key in (0, 2, 4)]
    leaving = {2}
    found: dict[int, list[int]] = {}
    for step in range(2 * (TOKENS + 8)):
        joining = {0: texts[:1], 4: texts[1:2], 7: texts[2:]}.get(step, [])
        for item in slots.step(leaving if step == 7 else (), joining):
            found.setdefault(item.key, []).append(item.place.token)
        if step == 4:
            assert slots.count_fitting([(2, 1)], ()) == 0
        if len(found.get(4, [])) == TOKENS:
            break
    return found


@pytest.mark.parametrize("model", MODELS)
def test_what_a_text_leaves_in_the_cache_is_no_matter(checkpoints, one_rank, model):
    """As when its numbers were infinite: what a mask hides is multiplied by 0."""
    (found,) = run_distributed(_behind_infinite_numbers, 1, f"{checkpoints}/{model}")
    expected = one_rank[model][0]
    assert found == [expected[0][0], expected[4][0]]


def _behind_infinite_numbers(load: str) -> list[list[int]]:
    model, args = _model(load, load_model.Layout())
    slots = Slots(model, _vocabulary(args), 2, 32)
    with torch.inference_mode():
        for memory in slots._cache():
            memory.fill_(float("inf"))
    found: dict[int, list[int]] = {4: [], 0: []}
    for joining in ([Text(4, PROMPTS[4])], [Text(0, PROMPTS[0])], *[[]] * TOKENS):
        for _ in range(1 + bool(joining)):
            for item in slots.step((), joining):
                found[item.key].append(item.place.token)
            joining = []
    return [found[0][:TOKENS], found[4][:TOKENS]]


def test_after_an_error_in_the_middle_of_a_pair_the_next_text_is_right(checkpoints, one_rank):
    """Whether it came from a prompt or a token."""
    load = str(checkpoints / text_models.TAPS_INPUT)
    (found,) = run_distributed(_fail_and_go_on, 1, load)
    expected = one_rank[text_models.TAPS_INPUT][0][0][0]
    assert found == [expected] * len(found)


def _fail_and_go_on(load: str) -> list[list[int]]:
    model, args = _model(load, load_model.Layout())
    slots = Slots(model, _vocabulary(args), 2, 32)
    dense, moe = model.decoder.layers[2:4]
    found = []
    for part in (dense.mlp, moe.self_attention, moe.mlp.shared_experts, moe.mlp.experts):
        for joining in ([Text(2, PROMPTS[4])], []):
            slots.step((), [Text(1, PROMPTS[2])])
            slots.step()
            failing = mock.Mock(side_effect=RuntimeError("out of memory"))
            with mock.patch.object(part, "forward", failing), pytest.raises(RuntimeError):
                slots.step((), joining)
            slots.clear()
            written = []
            joining = [Text(0, PROMPTS[0])]
            while len(written) < TOKENS:
                written += [item.place.token for item in slots.step((), joining)]
                joining = []
            found.append(written)
    return found


@pytest.mark.parametrize("layout", [{}, {"expert": 2}], ids=["one rank", "EP2"])
def test_nor_do_offloaded_experts_change_a_bit(checkpoints, tmp_path, layout):
    load = checkpoints / text_models.TAPS_INPUT
    ranks = layout.get("expert", 1)
    for resident, offloaded in run_distributed(_offloaded, ranks, load, tmp_path, layout):
        assert offloaded == resident


def _offloaded(load: Path, folder: Path, layout: dict) -> tuple[list, list]:
    """What a batch writes with experts in memory, and with room for those of one layer."""
    layout = load_model.Layout(**layout)
    resident, _ = _join_and_leave(*_model(str(load), layout))
    offload = ExpertOffload(OffloadSettings(folder=folder))
    model, args = _model(str(load), layout, offload)
    offload.attach(model, load_model.Checkpoint(str(load)).path, SLOTS)
    offloaded, _ = _join_and_leave(model, args)
    return resident, offloaded


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    for index, (text, whole) in enumerate(zip(found, expected, strict=True)):
        tokens, log_probs, of_prompt = text
        whole_tokens, whole_log_probs, whole_of_prompt = whole
        count = _count(index)
        assert tokens == whole_tokens[:count]
        np.testing.assert_allclose(log_probs, whole_log_probs[:count], atol=ROUNDING)
        np.testing.assert_allclose(of_prompt, whole_of_prompt, atol=ROUNDING)


def _count(index: int) -> int:
    return TOKENS - 4 * (index % 2)


def _model(load: str, layout: load_model.Layout, offload: ExpertOffload | None = None):
    checkpoint = load_model.Checkpoint(load)
    model = load_model.build_model(checkpoint, layout, local_attention=True, elsewhere=offload)
    return model, checkpoint.args


def _vocabulary(args) -> int:
    return args.vocab_size or longcat.models.VOCAB


def _generate(model, args) -> list[tuple]:
    """Tokens, their log-probabilities, those of the prompt; every second text is sampled."""
    found = []
    for index, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(
            num_tokens_to_generate=TOKENS, return_log_probs=True, **_sampling(index)
        )
        (text,) = generation.generate(model, [prompt], sampling, _vocabulary(args), seed=index)
        found.append((text.tokens, text.log_probs, text.prompt_log_probs))
    return found


def _sampling(index: int) -> dict:
    return dict(top_k=1) if index % 2 == 0 else dict(top_k=0, temperature=0.9)


def _join_and_leave(model, args, chunk: int | None = None, **how) -> tuple[list[tuple], set[str]]:
    """What :func:`_generate` gives, and in what company texts have joined."""
    slots = Slots(model, _vocabulary(args), SLOTS, 32, chunk=chunk, **how)
    told = dict(log_probs=True, prompt_log_probs=True)
    texts = [
        Text(index, prompt, **_sampling(index), seed=index, **told)
        for index, prompt in enumerate(PROMPTS)
    ]
    found: list = [([], [], []) for _ in texts]
    waiting, running, leaving, company, steps = list(texts), set(), set(), set(), 0
    while waiting or running:
        joining = []
        if steps % 3 == 0:  # one after the other, two once
            lengths = [(len(text.prompt), _count(text.key)) for text in waiting]
            count = min(slots.count_fitting(lengths, leaving), 2 if steps == 9 else 1)
            joining, waiting = waiting[:count], waiting[count:]
        for text in joining:
            others = [len(PROMPTS[key]) + len(found[key][0]) for key in running]
            longest = max(others, default=0)
            company.add("beside others" if others else "alone")
            if others and len(text.prompt) > longest:
                company.add("longer than all others")
        running |= {text.key for text in joining}
        written = slots.step(leaving, joining)
        leaving = set()
        for item in written:
            tokens, log_probs, of_prompt = found[item.key]
            tokens.append(item.place.token)
            log_probs.append(item.place.log_prob)
            of_prompt += [place.log_prob for place in item.prompt]
            if len(tokens) == _count(item.key):
                running.discard(item.key)
                leaving.add(item.key)
        steps += 1
    return found, company
