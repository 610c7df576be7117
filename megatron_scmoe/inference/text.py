"""From generated ids to text: stop words, and text that a terminal may already be shown."""

from collections.abc import Sequence
from dataclasses import dataclass

_CONTEXT = 16
"""Tokens that are decoded with those behind them: more change nothing but the time."""

_ANEW = 64
"""Tokens that may be decoded with each new one; the text of those before is kept."""

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
        context = list(prompt[-_CONTEXT:])
        self._begin = self._kept = _Kept([], "", context, tokenizer.detokenize(context))
        self._stop_words = tuple(stop_words)
        self._shown = 0

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
        """The text of all ids.

        Decoded alone, they may lose a space, so they are with those before them. A prompt of ids may
        end in half a character: it belongs to the text that has the other half.
        """
        whole = list(ids)
        if whole[: len(self._kept.ids)] != self._kept.ids:
            self._kept = self._begin
        text = self._behind(self._kept, whole)
        if len(whole) - len(self._kept.ids) >= _ANEW:
            self._keep(whole, text)
        return text

    def _behind(self, kept: "_Kept", ids: list[int]) -> str:
        """The text of all ids, those behind what is kept decoded anew."""
        decoded = self._tokenizer.detokenize([*kept.context, *ids[len(kept.ids) :]])
        return kept.text + decoded[common_length(kept.context_text, decoded) :]

    def _keep(self, ids: list[int], text: str) -> None:
        """Keep the text of all ids but the last few, if decoding those behind it gives the same.

        It does not between two bytes of a character, or where a tokenizer draws two words together.
        """
        old, first = self._kept, ids[:-_CONTEXT]
        context = [*old.context, *first[len(old.ids) :]][-_CONTEXT:]
        new = _Kept(first, self._behind(old, first), context, self._tokenizer.detokenize(context))
        if self._behind(new, ids) == text:
            self._kept = new

    def _possible_stop(self, text: str) -> int:
        """How many of the last characters may be the first ones of a stop word."""
        lengths = [
            length
            for word in self._stop_words
            for length in range(1, len(word))
            if text.endswith(word[:length])
        ]
        return max(lengths, default=0)


@dataclass(frozen=True)
class _Kept:
    """Text that stands too far back to change."""

    ids: list[int]
    text: str
    context: list[int]
    """The last ones of them, or of the prompt."""
    context_text: str


def common_length(one: str, other: str) -> int:
    """With how many characters both begin."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
