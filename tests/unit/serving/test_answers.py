"""What an answer tells of text that is not whole, or that some clients would cut."""

import json

import pytest

from megatron_scmoe.inference.slots import Place
from megatron_scmoe.serving.answers import ChatAnswer, CompletionAnswer, Written, offsets
from megatron_scmoe.serving.app import _event

WORDS = {1: "\N{LATIN SMALL LETTER E WITH ACUTE}", 2: "\N{REPLACEMENT CHARACTER}"}


def test_half_a_character_has_no_bytes():
    """A client would join them to another character."""
    answer = ChatAnswer("m", WORDS.__getitem__, with_log_probs=True)
    written = Written(places=[(Place(1, -0.5, [(1, -0.5), (2, -1.0)]), 0), (Place(2, -1.0), 1)])
    first, second = answer.chunk(0, written)["choices"][0]["logprobs"]["content"]
    assert first["bytes"] == [0xC3, 0xA9]
    assert [top["bytes"] for top in first["top_logprobs"]] == [[0xC3, 0xA9], None]
    assert second["bytes"] is None


def test_of_tokens_with_one_text_the_likeliest_is_told_of():
    """A harness takes the largest of them for what greedy writes."""
    answer = CompletionAnswer("m", lambda token: WORDS[2], with_log_probs=True)
    written = Written(places=[(Place(3, -4.0, [(1, -0.5), (2, -1.0)]), 0)])
    told = answer.chunk(0, written)["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{WORDS[2]: -0.5}]
    assert told["token_logprobs"] == [-4.0]


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["<s>", "a", " bc", "d"], "a bcd", [0, 0, 1, 4]),  # <s> is not shown
        ([b"\xe6", b"\x97", b"\xa5", b"x"], "\u65e5x", [0, 0, 0, 1]),
        (["a", b"\xc3", b"\xa9"], "a\xe9", [0, 1, 1]),
        (["a", "b"], "b", [0, 0]),  # cut at the begin
        (["ab", "c", "d"], "a", [0, 1, 1]),  # shown otherwise than it is decoded
    ],
)
def test_places_lie_in_the_text_that_is_shown(pieces, text, expected):
    def detokenize(ids):
        parts = (p if isinstance(p, bytes) else p.encode() for p in (pieces[i] for i in ids))
        return b"".join(parts).decode(errors="replace")

    assert offsets(detokenize, list(range(len(pieces))), text) == expected


def test_an_event_is_one_line_for_every_client():
    data = {"text": "a\u2028b\x85c\nd\N{EURO SIGN}"}
    event = _event(data)
    assert event.isascii() and event.endswith("\n\n")
    (line, _) = event.splitlines()
    assert json.loads(line.removeprefix("data: ")) == data
