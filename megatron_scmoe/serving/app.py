"""The API over HTTP: an ASGI application in front of an engine."""

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_scmoe.inference.engine import CLOSING, Engine, Job, Progress
from megatron_scmoe.inference.slots import Place, Text
from megatron_scmoe.inference.text import Continuation
from megatron_scmoe.serving.answers import Answer, ChatAnswer, CompletionAnswer, Written, offsets
from megatron_scmoe.serving.chat import ChatPrompts
from megatron_scmoe.serving.metrics import CONTENT_TYPE, Metrics
from megatron_scmoe.serving.protocol import (
    MAX_TEXTS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    brief,
    parse,
)
from megatron_scmoe.serving.writer import Writer

MAX_BODY = 32 << 20
"""Bytes of the largest body that is read."""

CLIENT_GONE = 499
"""Status, in the metrics, of a request whose client went away."""


@dataclass(frozen=True)
class ServedModel:
    """What the API needs to know of the model."""

    name: str
    tokenizer: Any
    """Megatron's."""
    vocab_size: int
    length: int
    """The most tokens of a text, its prompt included."""
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """The endpoints.

    Args:
        max_queue: texts that may wait for a slot; a request with more is refused (429).
    """

    def __init__(self, engine: Engine, model: ServedModel, max_queue: int):
        self._engine, self._model = engine, model
        self._metrics = Metrics(engine)
        self._writer = Writer(engine, self._metrics, max_queue)
        self._keys = itertools.count()
        self._chats = ChatPrompts(model.tokenizer) if model.tokenizer.chat_template else None
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        """A long prompt takes seconds, in which others are answered."""

    def app(self) -> ASGIApp:
        """The application."""
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._expose),
        ]
        handlers = {
            ApiError: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _end,
            Exception: _apologise,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        return _CountAnswers(app, self._metrics, {route.path for route in routes})

    async def _completions(self, request: Request) -> Response:
        wish = parse(CompletionRequest, await _body(request))
        self._check_name(wish.model)
        if wish.max_tokens == 0 and not wish.echo:
            raise ApiError(400, "'max_tokens' 0 goes with 'echo' only.", "max_tokens")
        with_log_probs = wish.logprobs is not None
        count = len(wish.prompts) * wish.n
        if not 1 <= count <= MAX_TEXTS:
            raise ApiError(
                400,
                f"'prompt' and 'n' ask for {count} texts: accepted are 1 to {MAX_TEXTS}.",
                "prompt",
            )
        parts, tokenize = [], self._model.tokenizer.tokenize
        for prompt in wish.prompts:
            ids = await self._beside(tokenize, prompt) if isinstance(prompt, str) else prompt
            echo = None
            if wish.echo:
                echo = prompt if isinstance(prompt, str) else self._model.tokenizer.detokenize(ids)
            parts += [_Part(ids, echo)] * wish.n
        told = dict(
            log_probs=with_log_probs,
            prompt_log_probs=with_log_probs and wish.echo,
            top_n=wish.logprobs or 0,
        )
        jobs = self._jobs(wish, parts, wish.max_tokens, told, "prompt")
        answer = CompletionAnswer(self._model.name, self._token, with_log_probs)
        return await self._answer(request, wish, parts, jobs, answer)

    async def _chat(self, request: Request) -> Response:
        wish = parse(ChatRequest, await _body(request))
        self._check_name(wish.model)
        if wish.top_logprobs and not wish.logprobs:
            raise ApiError(400, "'top_logprobs' goes with 'logprobs' only.", "top_logprobs")
        ids = await self._beside(self._prompt_of, wish)
        most = wish.max_completion_tokens or wish.max_tokens or self._model.length - len(ids)
        parts = [_Part(ids)] * wish.n
        told = dict(log_probs=wish.logprobs, top_n=wish.top_logprobs)
        jobs = self._jobs(wish, parts, max(1, most), told, "messages")
        answer = ChatAnswer(self._model.name, self._token, wish.logprobs)
        return await self._answer(request, wish, parts, jobs, answer)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(dict(object="list", data=[self._describe()]))

    async def _one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._describe())

    async def _health(self, request: Request) -> Response:
        if self._engine.is_closing:
            raise ApiError(503, CLOSING)
        return JSONResponse(dict(status="ok"))

    async def _expose(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    def _describe(self) -> dict[str, Any]:
        return dict(
            id=self._model.name,
            object="model",
            created=self._model.created,
            owned_by="megatron_scmoe",
            max_model_len=self._model.length,
        )

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            raise ApiError(
                404,
                f"The model '{brief(name)}' does not exist; this server has '{self._model.name}'.",
                "model",
                "model_not_found",
            )

    def _token(self, token: int) -> str:
        return self._model.tokenizer.detokenize([token])

    async def _beside[Result](self, work: Callable[..., Result], *values: Any) -> Result:
        """What the tokenizer gives, while other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *values)

    def _prompt_of(self, wish: ChatRequest) -> list[int]:
        """The messages as the model was trained on them."""
        if self._chats is None:
            raise ApiError(
                400,
                "The tokenizer of this model has no chat template; use /v1/completions.",
                "messages",
                "no_chat_template",
            )
        messages = [message.as_template_reads_it() for message in wish.messages]
        try:
            return self._chats.ids(messages)
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())
            raise ApiError(
                400, f"The chat template refuses these messages: {reason}", "messages"
            ) from error

    def _jobs(
        self,
        wish: CompletionRequest | ChatRequest,
        parts: Sequence["_Part"],
        max_tokens: int,
        told: dict[str, Any],
        param: str,
    ) -> list[Job]:
        """What the engine is asked for; refuses what it cannot do."""
        longest, vocab = self._model.length, self._model.vocab_size
        if wish.top_k > vocab:
            raise ApiError(
                400, f"'top_k' {wish.top_k}: accepted is 0 to {vocab}, the model's tokens.", "top_k"
            )
        for part in parts:
            if not part.ids:
                raise ApiError(400, f"'{param}' is empty: the model needs a token or more.", param)
            if not all(0 <= token < vocab for token in part.ids):
                raise ApiError(400, f"'{param}' has ids that are not 0 to {vocab - 1}.", param)
            if len(part.ids) + max_tokens > longest:
                raise ApiError(
                    400,
                    f"This model's maximum context length is {longest} tokens. However, you "
                    f"requested {len(part.ids) + max_tokens} tokens ({len(part.ids)} in the "
                    f"{param}, {max_tokens} in the completion).",
                    param,
                    "context_length_exceeded",
                )
        told["top_n"] = min(told["top_n"], vocab)
        seed = secrets.randbits(62) if wish.seed is None else wish.seed
        stop_words, sampling = wish.stop_words, wish.sampling
        return [
            Job(
                Text(next(self._keys), tuple(part.ids), **sampling, seed=seed, index=i, **told),
                max_tokens,
                Continuation(self._model.tokenizer, part.ids, stop_words),
                self._model.tokenizer.eod,
                tell=lambda progress: None,
            )
            for i, part in enumerate(parts)
        ]

    async def _answer(
        self,
        request: Request,
        wish: CompletionRequest | ChatRequest,
        parts: Sequence["_Part"],
        jobs: list[Job],
        answer: Answer,
    ) -> Response:
        """Write the texts, and answer with them."""
        prompts = sum(len(part.ids) for part in parts) // wish.n  # each is counted once
        started = [part.echo is None for part in parts]
        tokens = 0
        events = self._writer.write(request, jobs)

        async def pieces() -> AsyncGenerator[tuple[int, Written], None]:
            nonlocal tokens
            async with aclosing(events):
                async for index, progress in events:
                    tokens += len(progress.places)
                    piece = Written()
                    if not started[index]:
                        piece = await self._beside(self._echo, parts[index], progress)
                        started[index] = True
                    piece.add(progress, len(parts[index].echo or ""))
                    yield index, piece

        if not wish.stream:
            texts = [Written() for _ in jobs]
            async for index, piece in pieces():
                texts[index].extend(piece)
            return JSONResponse(answer.whole(texts, prompts, tokens))

        stream = pieces()
        first = await anext(stream)  # what goes wrong at once has a status of its own

        async def lines() -> AsyncGenerator[str, None]:
            async with aclosing(stream):
                for chunk in answer.first_chunks(len(jobs)):
                    yield _event(chunk)
                try:
                    yield _event(answer.chunk(*first))
                    async for index, piece in stream:
                        if piece.text or piece.finish_reason or piece.places:
                            yield _event(answer.chunk(index, piece))
                except ApiError as error:
                    yield _event(error.body())
                    return
                except ClientDisconnect:
                    return
                if wish.stream_options.include_usage:
                    yield _event(answer.last_chunk(prompts, tokens))
                yield "data: [DONE]\n\n"

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    def _echo(self, part: "_Part", progress: Progress) -> Written:
        """An echoed prompt, with its places if they are told of."""
        places, text = [], part.echo or ""
        if progress.prompt or len(part.ids) == 1:
            starts = offsets(self._model.tokenizer.detokenize, part.ids, text)
            places = list(zip([Place(part.ids[0]), *progress.prompt], starts))
        return Written(text, places)


@dataclass(frozen=True)
class _Part:
    """A prompt of a request."""

    ids: list[int]
    echo: str | None = None
    """The prompt's text, if it is to stand before what is written."""


async def _body(request: Request) -> bytes:
    """The body of a request, which may not be endless."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"The body has more than {MAX_BODY} bytes.")
    return body


def _event(data: dict[str, Any]) -> str:
    """A server-sent event; ASCII alone, as some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(data)}\n\n"


async def _refuse(request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {brief(request.url.path)}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)


async def _end(request: Request, error: ClientDisconnect) -> Response:
    """Of a request whose client is gone; nobody reads it."""
    return Response(status_code=CLIENT_GONE)


async def _apologise(request: Request, error: Exception) -> Response:
    """Of a bug, whose traceback goes to the log."""
    return JSONResponse(ApiError(500, "The server had an error.").body(), 500)


@dataclass(frozen=True)
class _CountAnswers:
    """Middleware that counts answers by path and status."""

    app: ASGIApp
    metrics: Metrics
    paths: set[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
