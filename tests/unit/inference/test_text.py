"""What a terminal is shown of a text that is being written."""

import pytest

from megatron_scmoe.inference.text import Continuation


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    def detokenize(self, ids) -> str:
        return bytes(ids).decode("utf-8", "replace")


def shown(text: str, *stop_words: str, prompt: str = "ab") -> list[str]:
    """What is shown after each token, and at the end."""
    continuation = Continuation(Bytes(), list(prompt.encode()), stop_words)
    ids = list(text.encode())
    parts = [continuation.new_text(ids[:count]) for count in range(1, len(ids) + 1)]
    return [*parts, continuation.new_text(ids, is_last=True)]


def test_a_text_is_shown_as_it_comes():
    assert shown("cde") == ["c", "d", "e", ""]


def test_half_a_character_waits_for_the_other_half():
    assert shown("\N{LATIN SMALL LETTER E WITH ACUTE}x") == [
        "",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "x",
        "",
    ]


def test_what_may_become_a_stop_word_waits_and_a_stop_word_is_never_shown():
    assert shown("x<y<end>", "<end>") == ["x", "", "<y", "", "", "", "", "", ""]
    assert "".join(shown("x<yz<en<end>", "<end>")) == "x<yz<en"


def test_what_waited_is_shown_at_the_end():
    assert shown("x<e", "<end>") == ["x", "", "", "<e"]


def test_a_stop_word_in_the_prompt_is_none():
    assert "".join(shown("xy", "ab")) == "xy"


def test_the_length_of_the_prompt_changes_nothing():
    assert shown("x<y<end>", "<end>", prompt="p" * 99) == shown("x<y<end>", "<end>")


def test_the_text_ends_before_the_first_of_several_stop_words():
    continuation = Continuation(Bytes(), b"p", ["dd", "c"])
    assert continuation.text(b"abcdd") == "ab"
    assert continuation.stops(b"abc") and not continuation.stops(b"abd")


def test_a_prompt_that_ends_in_half_a_character_leaves_it_to_the_text():
    whole = "a\N{EURO SIGN}b".encode()  # the sign has three bytes
    for count in (2, 3):
        continuation = Continuation(Bytes(), whole[:count], ["b"])
        assert continuation.text(whole[count:3]) == ""
        assert continuation.new_text(whole[count:4]) == "\N{EURO SIGN}"
        assert continuation.stops(whole[count:])


def test_a_prompt_may_end_in_the_replacement_character():
    assert "".join(shown("xy", prompt="a\N{REPLACEMENT CHARACTER}")) == "xy"


LONG = (
    "don't go . \N{EURO SIGN}5 naïve \N{EN DASH} 漢字 \N{GRINNING FACE}! It 's 3.5 , we 've\n\tseen; "
    * 40
)


def test_a_long_text_is_the_one_of_all_its_tokens():
    """Words, signs that a tokenizer may draw to the word before them, characters of many bytes."""
    assert "".join(shown(LONG, "<never>")) == LONG
    assert "".join(shown(LONG + "<end> and more", "<end>")) == LONG


class Closing(Bytes):
    """Also closes gaps, as Hugging Face's clean-up does."""

    def detokenize(self, ids) -> str:
        return super().detokenize(ids).replace(" .", ".").replace(" n't", "n't")


@pytest.mark.parametrize("length", range(40, 70))
def test_a_space_may_still_go_when_the_next_token_comes(length):
    ids = (("x" * length + " . do n't ") * 9).encode()
    continuation = Continuation(Closing(), b"p")
    for count in range(1, len(ids) + 1):
        text = continuation.text(ids[:count])
        assert text == Closing().detokenize(ids[:count])


def test_of_a_long_text_only_the_last_tokens_are_decoded_anew():
    sizes = []

    class Counting(Bytes):
        def detokenize(self, ids) -> str:
            sizes.append(len(ids))
            return super().detokenize(ids)

    continuation = Continuation(Counting(), b"p" * 50)
    ids = LONG.encode()
    for count in range(1, len(ids) + 1):
        continuation.new_text(ids[:count])
    assert max(sizes) < 150 < len(ids)
    assert continuation.text(ids[:100]) == LONG.encode()[:100].decode("utf-8", "replace")
