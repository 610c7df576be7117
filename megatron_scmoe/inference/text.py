"""From generated ids to text: stop words, and text that a terminal may already be shown."""

from collections.abc import Sequence

_CONTEXT = 16
"""Tokens of the prompt that are decoded with those behind it: more change nothing but the time."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode some bytes of a character to, while the others are not there."""


class Continuation:
    """The text that ids make behind those of a prompt.

    Args:
        tokenizer: Megatron's.
        prompt: ids of the prompt.
        stop_words: strings that end the text before them.
    """

    def __init__(self, tokenizer, prompt: Sequence[int], stop_words: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._prompt = list(prompt[-_CONTEXT:])
        self._prompt_text = tokenizer.detokenize(self._prompt)
        self._stop_words = tuple(stop_words)
        self._shown = 0
        self._decoded: tuple[list[int], str] = ([], "")

    def text(self, ids: Sequence[int]) -> str:
        """The text of all ids, up to the first stop word."""
        text = self._decode(ids)
        places = [place for word in self._stop_words if (place := text.find(word)) >= 0]
        return text[: min(places)] if places else text

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether a stop word stands in the text of the ids."""
        text = self._decode(ids)
        return any(word in text for word in self._stop_words)

    def new_text(self, ids: Sequence[int], is_last: bool = False) -> str:
        """What may be shown now and was not given by an earlier call.

        Kept back, unless these ids are the last, is what the next token may change: half a character,
        and what may be the beginning of a stop word.
        """
        text = self.text(ids)
        if not is_last and not self.stops(ids):
            text = text.rstrip(HALF)
            text = text[: len(text) - self._possible_stop(text)]
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of all ids; that of the last call is kept.

        Decoded alone, they may lose a space. A prompt of ids may end in half a character: it belongs
        to the text that has the other half.
        """
        if self._decoded[0] != list(ids):
            text = self._tokenizer.detokenize([*self._prompt, *ids])
            skip = _common_length(self._prompt_text, text)
            self._decoded = (list(ids), text[skip:])
        return self._decoded[1]

    def _possible_stop(self, text: str) -> int:
        """How many of the last characters may be the first ones of a stop word."""
        lengths = [
            length
            for word in self._stop_words
            for length in range(1, len(word))
            if text.endswith(word[:length])
        ]
        return max(lengths, default=0)


def _common_length(one: str, other: str) -> int:
    """With how many characters both begin."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
