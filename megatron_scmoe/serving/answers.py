"""The bodies of answers: what was written, as OpenAI's completions and chat completions."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_scmoe.inference.engine import Progress
from megatron_scmoe.inference.slots import Place
from megatron_scmoe.inference.text import HALF, common_length

TextOf = Callable[[int], str]
"""The text of an id."""


@dataclass
class Written:
    """All or a part of a text."""

    text: str = ""
    places: list[tuple[Place, int]] = field(default_factory=list)
    """Its tokens, and how many characters stand before each."""
    finish_reason: str | None = None

    def add(self, progress: Progress, before: int = 0) -> None:
        """Add what is new; ``before`` are characters of an echoed prompt."""
        self.text += progress.text
        self.places += [(place, before + progress.start) for place in progress.places]
        self.finish_reason = progress.finish_reason

    def extend(self, other: "Written") -> None:
        """Add a later part."""
        self.text += other.text
        self.places += other.places
        self.finish_reason = other.finish_reason


def offsets(detokenize: Callable[[list[int]], str], ids: list[int], text: str) -> list[int]:
    """How many characters of ``text`` stand before each token of it.

    A token that is not shown, such as one for the begin, has no character, and parts of a character
    stand where it does.

    Args:
        detokenize: the text of ids.
        ids: of all of ``text``.
        text: what is shown of them.
    """
    whole = detokenize(ids)
    hidden = len(whole) - len(text) if whole.endswith(text) else 0
    found = [0]
    for end in range(1, len(ids)):
        before = common_length(detokenize(ids[:end]), whole) - hidden
        found.append(min(max(before, found[-1]), len(text)))
    return found


class Answer:
    """The answer to one request, whole or in chunks.

    Args:
        model: its name.
        token: tells the text of an id.
        with_log_probs: whether places are told of.
    """

    id_prefix: str
    kind: str
    kind_of_chunk: str

    def __init__(self, model: str, token: TextOf, with_log_probs: bool):
        self._token, self._with_log_probs = token, with_log_probs
        self._head = dict(id=f"{self.id_prefix}-{uuid.uuid4().hex}", created=int(time.time()))
        self._model = model

    def whole(self, texts: Sequence[Written], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The body of an answer in one piece."""
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        return self._body(self.kind, choices) | {"usage": usage(prompt_tokens, tokens)}

    def chunk(self, index: int, part: Written) -> dict[str, Any]:
        """A piece of text number ``index``."""
        return self._body(self.kind_of_chunk, [self._piece(index, part)])

    def last_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The piece that tells how many tokens there were."""
        return self._body(self.kind_of_chunk, []) | {"usage": usage(prompt_tokens, tokens)}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """What comes before any text."""
        return []

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(**self._head, object=kind, model=self._model, choices=choices)

    def _choice(self, index: int, text: Written) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, index: int, part: Written) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of ``/v1/completions``."""

    id_prefix = "cmpl"
    kind = kind_of_chunk = "text_completion"

    def _choice(self, index: int, text: Written) -> dict[str, Any]:
        log_probs = self._log_probs(text) if self._with_log_probs else None
        return dict(
            index=index, text=text.text, logprobs=log_probs, finish_reason=text.finish_reason
        )

    def _piece(self, index: int, part: Written) -> dict[str, Any]:
        return self._choice(index, part)

    def _log_probs(self, text: Written) -> dict[str, Any]:
        """Parallel lists; the first token of an echoed prompt has nothing before it, and so none.

        Of tokens with one text, such as halves of characters, the likeliest is told of.
        """
        tops = []
        for place, _ in text.places:
            top: dict[str, float | None] = {}
            for token, log_prob in (*place.likeliest, (place.token, place.log_prob)):
                top.setdefault(self._token(token), log_prob)
            tops.append(top)
        return dict(
            tokens=[self._token(place.token) for place, _ in text.places],
            token_logprobs=[place.log_prob for place, _ in text.places],
            top_logprobs=[
                None if place.log_prob is None else top
                for (place, _), top in zip(text.places, tops)
            ],
            text_offset=[offset for _, offset in text.places],
        )


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    id_prefix = "chatcmpl"
    kind, kind_of_chunk = "chat.completion", "chat.completion.chunk"

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        delta = dict(role="assistant", content="")
        return [
            self._body(self.kind_of_chunk, [dict(index=i, delta=delta, finish_reason=None)])
            for i in range(count)
        ]

    def _choice(self, index: int, text: Written) -> dict[str, Any]:
        message = dict(role="assistant", content=text.text, refusal=None)
        return dict(index=index, message=message, **self._rest(text))

    def _piece(self, index: int, part: Written) -> dict[str, Any]:
        delta = dict(content=part.text) if part.text else {}
        return dict(index=index, delta=delta, **self._rest(part))

    def _rest(self, text: Written) -> dict[str, Any]:
        log_probs = None
        if self._with_log_probs:
            log_probs = dict(content=[self._place(place) for place, _ in text.places], refusal=None)
        return dict(logprobs=log_probs, finish_reason=text.finish_reason)

    def _place(self, place: Place) -> dict[str, Any]:
        top = [self._of_token(*item) for item in place.likeliest]
        return self._of_token(place.token, place.log_prob) | {"top_logprobs": top}

    def _of_token(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self._token(token)
        octets = None if HALF in text else list(text.encode())
        return dict(token=text, logprob=log_prob, bytes=octets)


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """How many tokens there were."""
    total = prompt_tokens + tokens
    return dict(prompt_tokens=prompt_tokens, completion_tokens=tokens, total_tokens=total)
