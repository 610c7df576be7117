"""What clients of the API may ask for, and the errors that it answers with.

Fields have OpenAI's names and defaults; ``top_k`` is added. A field whose value means nothing to this
server is accepted where it says what the server does anyway, and refused otherwise.
"""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_scmoe.errors import NOT_JSON

MAX_TEXTS = 128
"""Most texts that one request may ask for."""
MAX_LIKELIEST = 20
"""Most tokens told of in each place."""
MAX_STOPS = 16
"""Most stop words; OpenAI takes 4."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong, if it is one.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer, as OpenAI writes it."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        error = dict(message=self.message, type=kind, param=self.param, code=self.code)
        return {"error": error}


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = None

    @property
    def stop_words(self) -> list[str]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(words) > MAX_STOPS or "" in words:
            raise ApiError(
                400,
                f"Invalid 'stop': accepted are at most {MAX_STOPS} strings of one character or more.",
                "stop",
            )
        return words

    @property
    def sampling(self) -> dict[str, Any]:
        """``temperature``, ``top_k`` and ``top_p`` as :class:`~megatron_scmoe.inference.slots.Text`
        has them."""
        top_p = 0.0 if self.top_p == 1 else self.top_p  # of all tokens
        if self.top_k > 1 and top_p:
            raise ApiError(
                400, "'top_k' and 'top_p' exclude each other: leave one of them out.", "top_k"
            )
        if self.temperature == 0 or self.top_k == 1:
            return dict(temperature=1.0, top_k=1, top_p=0.0)
        return dict(temperature=float(self.temperature), top_k=self.top_k, top_p=float(top_p))


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or its ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return prompt


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    text: str


class Message(BaseModel):
    """A message of a chat; a template may read more fields than these."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart] = ""

    @field_validator("content", mode="before")
    @classmethod
    def has_text_alone(cls, content: Any) -> Any:
        """Refuse images and the like by their name; an assistant's message may have no text."""
        if content is None:
            return ""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ApiError(
                    400,
                    f"'messages' has a part of type '{brief(kind)}': this server reads 'text' only.",
                    "messages",
                    "unsupported",
                )
        return content

    def as_template_reads_it(self) -> dict[str, Any]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] = 0


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields of OpenAI's that this server lacks, and the values with which nothing is asked of them."""


def parse[Kind: _Request](kind: type[Kind], body: bytes) -> Kind:
    """A request from the body of HTTP.

    Raises:
        ApiError: if it is none.
    """
    try:
        text = body.decode("utf-8-sig")
        fields = json.loads(text)
    except NOT_JSON:
        fields = None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body of the request is not a JSON object.")
    if "\\ud" in text.lower():
        _refuse_half_pairs(fields)
    given = {name: value for name, value in fields.items() if value is not None}
    for name, neutral in _NEUTRAL.items():
        if name in given and given.pop(name) not in neutral:
            raise ApiError(400, f"This server does not support '{name}'.", name, "unsupported")
    try:
        wish = kind.model_validate(given)
    except ValidationError as error:
        raise _in_one_line(error, given) from error
    if "stream_options" in given and not wish.stream:
        raise ApiError(400, "'stream_options' goes with 'stream' only.", "stream_options")
    return wish


def brief(text: str) -> str:
    """What a client has written, as an answer repeats it: in one line, and not all of it."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:37] + "..."


def _refuse_half_pairs(fields: dict[str, Any]) -> None:
    """Refuse text that is no Unicode: JSON can write half of a surrogate pair."""
    for name, value in fields.items():
        for part, param in ((name, None), (value, name)):
            try:
                json.dumps(part, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                what = f"'{param}'" if param else "argument"
                raise ApiError(
                    400, f"Invalid {what}: it is no text that UTF-8 can hold.", param
                ) from error


def _in_one_line(error: ValidationError, given: dict[str, Any]) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        unknown = brief(".".join(map(str, first["loc"])))
        return ApiError(
            400, f"Unrecognized request argument supplied: {unknown}", brief(name or "")
        )
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{name}'.", name)
    if name == "prompt":
        return ApiError(
            400, "Invalid 'prompt': accepted is a text, a list of ids, or a list of either.", name
        )
    where, wrong = _innermost(first["loc"], given)
    return ApiError(400, f"Invalid '{where}' {brief(json.dumps(wrong))}: {first['msg']}.", name)


def _innermost(loc: tuple[int | str, ...], given: Any) -> tuple[str, Any]:
    """What is wrong, as one would write it (``messages[0].content``), and its value.

    Args:
        loc: pydantic's place of it, which ends with names of types where several are accepted.
        given: the request.
    """
    where, value = "", given
    for step in loc:
        try:
            value = value[step]
        except (LookupError, TypeError):
            break
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else step
    return where, value
