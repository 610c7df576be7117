"""--decode-schedule: the same texts with each; auto keeps what took less time, on all ranks alike."""

import pytest
from megatron.core.inference.sampling_params import SamplingParams

from megatron_scmoe.config import AUTO, OVERLAPPED, SERIAL
from megatron_scmoe.inference import decode_schedule, generation
from megatron_scmoe.inference.decode_schedule import ROUNDS, Decode
from megatron_scmoe.inference.slots import Slots, Text
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.training import load_model
from tests import text_models
from tests.harness import run_distributed

TRIAL = 2 * (ROUNDS + 1)
"""Tokens until one is kept."""

TOKENS = TRIAL + 4
PROMPTS = [(5, 9, 2, 7), (3,), (8, 8, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two ranks, which share the experts, has seen."""
    folder = tmp_path_factory.mktemp("model")
    text_models.save(folder, text_models.train_tokenizer(folder), text_models.TAPS_INPUT)
    return run_distributed(_on_two_ranks, 2, str(folder / text_models.TAPS_INPUT))


def _on_two_ranks(load: str) -> dict:
    model = load_model.build_model(
        load_model.Checkpoint(load), load_model.Layout(expert=2), local_attention=True
    )
    path = next(m for m in model.modules() if isinstance(m, ScMoELayer)).path
    seen = _Seen(path)
    found = {}
    for name in (OVERLAPPED, SERIAL):
        decode = Decode(model, name)
        found[name] = _texts(model, decode), seen.take(), decode.kept()
    for slower in (OVERLAPPED, SERIAL):
        decode = Decode(model, AUTO)
        decode_schedule.clock = lambda slower=slower: seen.seconds(slower)
        found[f"{slower} is slower"] = _texts(model, decode), seen.take(), decode.kept()
    found["slots"] = _slots(model)
    found["own schedule is back"] = path.schedule == seen.own
    return found


class _Seen:
    """The schedules that a routed path had, one for each token; and a clock by which one is slower."""

    def __init__(self, path):
        self.own, self._seen, self._path, self._now = path.schedule, [], path, 0.0
        begun = path.begin

        def begin(*args, **kwargs):
            self._seen.append(OVERLAPPED if path.schedule == self.own else SERIAL)
            return begun(*args, **kwargs)

        path.begin = begin

    def seconds(self, slower: str) -> float:
        is_overlapped = self._path.schedule == self.own
        self._now += 2.0 if is_overlapped == (slower == OVERLAPPED) else 1.0
        return self._now

    def take(self) -> list[str]:
        seen, self._seen[:] = list(self._seen), []
        return seen


def _texts(model, decode: Decode) -> list[list[int]]:
    sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1)
    texts = generation.generate(
        model, PROMPTS, sampling, text_models.VOCAB, micro_batch=2, decode=decode
    )
    return [text.tokens for text in texts]


def _slots(model) -> tuple[list[list[int]], dict[str, str]]:
    """Texts of a batch with fewer texts than ranks, then more; and what was kept for each."""
    slots = Slots(model, text_models.VOCAB, 4, 32)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for joining in (PROMPTS[:1], PROMPTS[1:]):
        known = sum(map(bool, tokens))
        texts = [Text(known + number, prompt) for number, prompt in enumerate(joining)]
        for step in range(TRIAL + 1):
            for item in slots.step((), texts if step == 0 else ()):
                tokens[item.key].append(item.place.token)
    return tokens, slots.decode_schedules()


def test_each_gives_the_same_texts(found):
    texts = {name: row[name][0] for row in found for name in (OVERLAPPED, SERIAL)}
    assert texts[OVERLAPPED] == texts[SERIAL]
    for row in found:
        assert all(len(text) == TOKENS for text in row[SERIAL][0])
        for slower in (OVERLAPPED, SERIAL):
            assert row[f"{slower} is slower"][0] == texts[SERIAL]


def test_the_one_asked_for_is_had_behind_the_prompts(found):
    for row in found:
        _, seen, kept = row[SERIAL]
        assert seen[0] == OVERLAPPED
        assert set(seen[1:]) == {SERIAL}
        assert set(row[OVERLAPPED][1]) == {OVERLAPPED}
        assert kept == row[OVERLAPPED][2] == {}
        assert row["own schedule is back"]


@pytest.mark.parametrize("slower,faster", [(OVERLAPPED, SERIAL), (SERIAL, OVERLAPPED)])
def test_the_faster_one_is_kept(found, slower, faster):
    for row in found:
        _, seen, kept = row[f"{slower} is slower"]
        assert kept == {"2 to 3": faster}
        assert {OVERLAPPED, SERIAL} == set(seen[1 : TRIAL + 1])
        assert set(seen[TRIAL + 1 :]) == {faster}


def test_a_batch_chooses_for_each_power_of_two_of_texts(found):
    for row in found:
        texts, kept = row["slots"]
        assert list(kept) == ["1", "2 to 3"]
        alone = row[SERIAL][0]
        assert [text[: TRIAL + 1] for text in texts] == [text[: TRIAL + 1] for text in alone]
