"""scmoe serve, as a client sees it: the official one, against the real server."""

import asyncio
import json
import re
import socket
import time
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.inference.text import Continuation
from megatron_scmoe.training import load_model
from tests import text_models
from tests.harness import run_distributed
from tests.served import Server
from tests.text_models import LENGTH, PROMPTS, TAPS_INPUT, VOCAB
from tests.tools import run_tool

NAME = "tap"
TOKENS, SLOTS, QUEUE = 8, 8, 200
SEEDED = dict(temperature=0.9, seed=3)

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)

ROUNDING = 1e-5
"""fp32: batches of another size group sums otherwise."""


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("served")
    text_models.save(folder, text_models.train_tokenizer(folder), TAPS_INPUT)
    return folder / TAPS_INPUT


@pytest.fixture(scope="module")
def written(load, tmp_path_factory) -> dict[str, list[dict]]:
    """What `scmoe generate` writes."""
    (texts,) = run_distributed(_generate, 1, load, tmp_path_factory.mktemp("written"))
    return texts


def _generate(load: Path, out: Path) -> dict[str, list[dict]]:
    words = ["--load", load, "--prompts", *PROMPTS, "--num-tokens-to-generate", TOKENS]
    runs = {
        "greedy": ["--return-log-probs", "--top-n-logprobs", 2],
        "seeded": ["--temperature", 0.9, "--seed", 3],
    }
    for name, flags in runs.items():
        run_tool("generate", *words, *flags, "--output-path", out / f"{name}.jsonl")
    return {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in runs
    }


@pytest.fixture(scope="module")
def greedy(written) -> list[dict]:
    return written["greedy"]


@pytest.fixture(scope="module")
def server(load, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    words = ["--load", load, "--served-model-name", NAME, "--chat-template", template]
    limits = ["--inference-max-requests", SLOTS, "--max-queue", QUEUE]
    with Server(*words, *limits) as server:
        yield server


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A folder for files of experts."""
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt=PROMPTS, **fields):
    fields = {"max_tokens": TOKENS, "temperature": 0, "model": NAME, **fields}
    return client.completions.create(prompt=prompt, **fields)


def texts(answer) -> list[str]:
    return [choice.text for choice in answer.choices]


def test_the_model_has_its_name(client):
    (model,) = client.models.list().data
    assert model.id == NAME == client.models.retrieve(NAME).id


def test_greedy_texts_and_log_probs_are_those_of_generate(client, greedy):
    answer = complete(client, logprobs=2)
    assert [choice.index for choice in answer.choices] == list(range(len(PROMPTS)))
    for choice, line in zip(answer.choices, greedy, strict=True):
        assert choice.text == line["generated_text"]
        assert choice.finish_reason == line["finish_reason"] == "length"
        told = choice.logprobs
        np.testing.assert_allclose(told.token_logprobs, line["generated_log_probs"], atol=ROUNDING)
        for top, best in zip(told.top_logprobs, line["generated_top_n_logprobs"], strict=True):
            assert max(top.values()) == pytest.approx(best[0]["log_prob"], abs=ROUNDING)
    assert answer.usage.prompt_tokens == sum(len(line["prompt_tokens"]) for line in greedy)
    assert answer.usage.completion_tokens == TOKENS * len(PROMPTS)


def test_a_seed_writes_what_it_writes_in_generate(client, written):
    expected = [line["generated_text"] for line in written["seeded"]]
    assert texts(complete(client, **SEEDED)) == expected
    assert texts(complete(client, temperature=0.9, seed=4)) != expected


def test_several_texts_of_one_prompt_differ_and_repeat_with_the_seed(client):
    several = texts(complete(client, PROMPTS[0], n=3, **SEEDED))
    assert len(set(several)) == 3
    assert texts(complete(client, PROMPTS[0], n=3, **SEEDED)) == several


def test_without_a_seed_texts_differ(client):
    sampled = [texts(complete(client, PROMPTS[0], temperature=1.5))[0] for _ in range(2)]
    assert sampled[0] != sampled[1]


def test_ids_are_a_prompt_too(client, greedy):
    ids = [line["prompt_tokens"] for line in greedy]
    expected = [line["generated_text"] for line in greedy]
    assert texts(complete(client, ids)) == expected
    assert texts(complete(client, ids[1])) == expected[1:2]


def test_top_k_takes_the_likeliest(client, greedy):
    answer = complete(client, temperature=1, seed=1, extra_body={"top_k": 1})
    assert texts(answer) == [line["generated_text"] for line in greedy]


def test_a_stream_is_the_text_in_pieces(client):
    whole = complete(client, logprobs=1, n=2, **SEEDED)
    parts = ["" for _ in whole.choices]
    places: list[list] = [[] for _ in whole.choices]
    reasons, usage = {}, None
    options = {"include_usage": True}
    for chunk in complete(client, logprobs=1, n=2, **SEEDED, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] += choice.text
            places[choice.index] += choice.logprobs.token_logprobs
            reasons[choice.index] = choice.finish_reason
    assert parts == texts(whole)
    for choice, log_probs in zip(whole.choices, places, strict=True):
        np.testing.assert_allclose(log_probs, choice.logprobs.token_logprobs, atol=ROUNDING)
        assert reasons[choice.index] == choice.finish_reason
    assert usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_word(client, greedy, stream):
    text = greedy[3]["generated_text"]
    word = text[3:5]
    answer = complete(client, PROMPTS[3], stop=["nowhere", word], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(text for chunk in chunks for text in texts(chunk)) == text.partition(word)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_echo_has_the_prompt_and_its_log_probs(client, greedy):
    """As tools that score given texts ask for it."""
    line = greedy[2]
    for count in (0, 2):
        answer = complete(client, PROMPTS[2], echo=True, max_tokens=count, logprobs=1)
        told = answer.choices[0].logprobs
        expected = line["prompt_log_probs"] + line["generated_log_probs"][:count]
        assert told.token_logprobs[0] is None
        np.testing.assert_allclose(told.token_logprobs[1:], expected, atol=ROUNDING)
        assert answer.choices[0].text.startswith(PROMPTS[2])
        assert (answer.choices[0].text == PROMPTS[2]) == (count == 0)
        assert told.text_offset == sorted(told.text_offset)
        assert told.text_offset[len(line["prompt_tokens"]) :][:1] == [len(PROMPTS[2])] * (count > 0)


MESSAGES = [{"role": "user", "content": "Hi"}]
RENDERED = "user: Hi\nassistant:"


def test_a_chat_is_the_completion_of_its_template(client):
    expected = complete(client, RENDERED, logprobs=2).choices[0]
    asked = dict(model=NAME, messages=MESSAGES, temperature=0, max_completion_tokens=TOKENS)
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    told = choice.logprobs.content
    assert [place.token for place in told] == expected.logprobs.tokens
    np.testing.assert_allclose(
        [place.logprob for place in told], expected.logprobs.token_logprobs, atol=ROUNDING
    )
    assert {len(place.top_logprobs) for place in told} == {2}
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert (
        client.chat.completions.create(**{**asked, "messages": parts}).choices[0].message.content
        == expected.text
    )


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens == LENGTH
    assert answer.choices[0].finish_reason == "length"


def refusal(call, kind=openai.BadRequestError):
    """The error that a call is answered with, which has the form of OpenAI's."""
    with pytest.raises(kind) as refused:
        call()
    body = refused.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return refused.value


def test_bad_requests_are_refused_and_the_server_lives_on(client, greedy):
    many = "two rails " * 9
    for fields, param, told in (
        (dict(prompt=""), "prompt", "'prompt' is empty"),
        (dict(prompt=["A", ""]), "prompt", "'prompt' is empty"),
        (dict(prompt=[]), "prompt", "'prompt' and 'n' ask for 0 texts: accepted are 1 to 128"),
        (dict(prompt=[VOCAB]), "prompt", f"ids that are not 0 to {VOCAB - 1}"),
        (dict(prompt=[-1]), "prompt", f"ids that are not 0 to {VOCAB - 1}"),
        (dict(prompt=["A"] * 9, n=128), "prompt", "1152 texts"),
        (dict(prompt={"a": 1}), "prompt", "Invalid 'prompt': accepted is a text"),
        (dict(prompt=many), "prompt", f"maximum context length is {LENGTH} tokens"),
        (dict(max_tokens=LENGTH), "prompt", f"you requested {LENGTH + 1} tokens (1 in the prompt"),
        (dict(max_tokens=-1), "max_tokens", "Invalid 'max_tokens' -1"),
        (dict(max_tokens=0), "max_tokens", "'max_tokens' 0 goes with 'echo' only"),
        (dict(max_tokens="8"), "max_tokens", "Invalid 'max_tokens' \"8\""),
        (dict(temperature=-1), "temperature", "Invalid 'temperature' -1"),
        (dict(top_p=0), "top_p", "Invalid 'top_p' 0"),
        (dict(logprobs=21), "logprobs", "Invalid 'logprobs' 21"),
        (dict(stop=["a", ""]), "stop", "strings of one character or more"),
        (dict(n=0), "n", "Invalid 'n' 0"),
        (dict(presence_penalty=1), "presence_penalty", "does not support 'presence_penalty'"),
        (dict(extra_body={"top_k": VOCAB + 1}), "top_k", f"accepted is 0 to {VOCAB}"),
        (dict(seed=-5), "seed", "Invalid 'seed' -5: Input should be greater than or equal to 0"),
        (dict(seed=2**63), "seed", f"Invalid 'seed' {2**63}: Input should be less than {2**63}"),
        (dict(extra_body={"tok_p": 1}), "tok_p", "Unrecognized request argument supplied: tok_p"),
    ):
        error = refusal(lambda fields=fields: complete(client, **{"prompt": "A", **fields}))
        assert told in error.body["message"], fields
        assert error.param == param, fields
    too_long = refusal(lambda: complete(client, "A", max_tokens=LENGTH))
    assert too_long.code == "context_length_exceeded"
    assert texts(complete(client, PROMPTS[1])) == [greedy[1]["generated_text"]]


def test_other_models_and_paths_are_not_found(client, server):
    error = refusal(lambda: complete(client, "A", model="gpt-4"), openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")
    refusal(lambda: client.embeddings.create(model=NAME, input="A"), openai.NotFoundError)
    assert httpx2.get(f"{server.url}/completions").status_code == 405


def test_a_chat_that_the_template_refuses_or_that_has_images(client):
    create = client.chat.completions.create
    tool = [{"role": "tool", "content": "1", "tool_call_id": "a"}]
    assert "no tools" in refusal(lambda: create(model=NAME, messages=tool)).body["message"]
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [{"role": "user", "content": image}]
    refused = refusal(lambda: create(model=NAME, messages=messages))
    assert refused.param == "messages" and "image_url" in refused.body["message"]
    assert refusal(lambda: create(model=NAME, messages=[])).param == "messages"


def test_what_is_no_json_is_refused(server):
    for body in (b"{", b"[]", b"\xff", b'{"model": "tap", "prompt": "\\udc80"}', b"[" * 100000):
        answer = httpx2.post(f"{server.url}/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def metric(server, name: str) -> float:
    lines = httpx2.get(server.url.removesuffix("v1") + "metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


CANCELLED = 'scmoe_texts_total{reason="cancelled"}'


def wait_until_idle(server) -> None:
    deadline = time.monotonic() + 60
    while metric(server, "scmoe_texts_running") or metric(server, "scmoe_texts_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_breaks_off_a_stream_frees_its_slots(client, server):
    before = metric(server, CANCELLED), metric(server, "scmoe_generated_tokens_total")
    with complete(client, ["A"] * 50, max_tokens=LENGTH - 1, stream=True) as stream:
        next(iter(stream))
        assert 0 < metric(server, "scmoe_texts_running") <= SLOTS
    wait_until_idle(server)
    assert metric(server, CANCELLED) > before[0]
    assert metric(server, "scmoe_generated_tokens_total") < before[1] + 50 * (LENGTH - 1)


def connect(server, body: bytes) -> socket.socket:
    """A connection that has sent the head of a request with this body."""
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


BODY = json.dumps(dict(model=NAME, prompt=["A"] * 50, max_tokens=LENGTH - 1)).encode()


def test_a_client_that_hangs_up_frees_its_slots(server):
    before = metric(server, CANCELLED)
    with connect(server, BODY) as connection:
        connection.sendall(BODY)
        while not metric(server, "scmoe_texts_running"):
            time.sleep(0.01)
        assert metric(server, "scmoe_texts_waiting") > 0
    wait_until_idle(server)
    assert metric(server, CANCELLED) > before


def test_a_client_that_hangs_up_within_its_request_is_no_error(server):
    gone = 'scmoe_requests_total{path="/v1/completions",status="499"}'
    before, deadline = metric(server, gone), time.monotonic() + 60
    with connect(server, BODY) as connection:
        connection.sendall(BODY[:9])
    while metric(server, gone) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "Traceback" not in server.output


def test_a_full_queue_is_told_of_at_once(client, server):
    with complete(client, "A", n=128, max_tokens=40, stream=True) as stream:
        next(iter(stream))
        error = refusal(lambda: complete(client, "A", n=128), openai.RateLimitError)
        assert error.code == "queue_full"
        assert error.response.headers["retry-after"] == "1"
    wait_until_idle(server)
    assert len(complete(client, "A", n=128, max_tokens=1).choices) == 128


def test_of_200_requests_at_once_none_is_lost(load, server, greedy):
    """More than twenty wait for each slot; lengths differ, so that they join at all tokens."""
    tokenizer = load_model.tokenizer_of(load_model.Checkpoint(str(load)))
    answers = ask_at_once(server, 200)
    assert len(answers) == 200
    assert_right(answers, greedy, tokenizer)


def ask_at_once(server, count: int) -> list:
    """Answers to that many requests; each asks for another length than the one before."""

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            return await asyncio.gather(
                *(
                    complete(client, PROMPTS[i % len(PROMPTS)], max_tokens=1 + i % TOKENS)
                    for i in range(count)
                )
            )

    return asyncio.run(ask_all())


def assert_right(answers: list, greedy: list[dict], tokenizer) -> None:
    for i, answer in enumerate(answers):
        line = greedy[i % len(PROMPTS)]
        words = Continuation(tokenizer, line["prompt_tokens"])
        assert texts(answer) == [words.text(line["generated_tokens"][: 1 + i % TOKENS])]


def test_health_and_metrics(client, server):
    root = server.url.removesuffix("/v1")
    assert httpx2.get(f"{root}/health").json() == {"status": "ok"}
    before = metric(server, "scmoe_generated_tokens_total")
    complete(client)
    assert metric(server, "scmoe_generated_tokens_total") == before + TOKENS * len(PROMPTS)
    assert metric(server, "scmoe_slots") == SLOTS
    assert metric(server, 'scmoe_requests_total{path="/v1/completions",status="400"}') > 0
    assert server.output.count("\n") == 1  # no request, good or bad, is a line in the log


def test_with_expert_parallelism_the_texts_are_the_same_until_the_signal(load, greedy, experts):
    """SIGTERM in the middle of a text: it is written to its end, then both ranks end well.

    Experts are on the host, so that both ranks sum up what their caches do.
    """
    words = ["--load", load, "--inference-max-requests", 3, "--expert-model-parallel-size", 2]
    words += ["--max-queue", 2, "--offload-experts", "--expert-folder", experts]
    with (
        Server(*words, "--served-model-name", NAME, ranks=2) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        expected = [line["generated_text"] for line in greedy]
        assert texts(complete(client)) == expected
        assert metric(server, "scmoe_expert_uses_total") >= 4 * TOKENS  # two layers, top-2
        many = refusal(lambda: complete(client, "A", n=7))
        assert many.body["message"] == "7 texts: this server takes 6 at most."
        refused = refusal(lambda: client.chat.completions.create(model=NAME, messages=MESSAGES))
        assert refused.code == "no_chat_template"
        with complete(client, "A", max_tokens=LENGTH - 1, stream=True, logprobs=0) as stream:
            chunks = [next(iter(stream))]
            server.signal()
            chunks += list(stream)
        assert len(chunks) == LENGTH - 1
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.end() == [0, 0], server.output


def test_with_offloaded_experts_the_texts_are_the_same_whoever_comes_and_goes(
    load, greedy, experts
):
    """Three slots for thirty requests, prompts in chunks, and a cache for all experts but a few."""
    flags = ["--offload-experts", "--expert-folder", experts, "--expert-cache-gb", 9e-5]
    words = ["--load", load, "--served-model-name", NAME, "--inference-max-requests", 3]
    words += ["--enable-chunked-prefill", "--inference-dynamic-batching-max-tokens", 4]
    tokenizer = load_model.tokenizer_of(load_model.Checkpoint(str(load)))
    with Server(*words, *flags) as server:
        answers = ask_at_once(server, 30)
        found = {
            name: metric(server, f"scmoe_expert_{name}_total")
            for name in ("uses", "hits", "copied_bytes", "wait_seconds")
        }
        held = float(re.search(r"that of experts (\S+) MiB", server.output)[1])
    assert_right(answers, greedy, tokenizer)
    assert found["uses"] > found["hits"] > 0
    assert found["copied_bytes"] > held * 2**20 > 0
    assert found["wait_seconds"] > 0


def test_caches_that_are_too_small_or_too_large_are_refused(load, experts):
    (told,) = run_distributed(_refused_caches, 1, load, experts)
    assert told == [
        "--expert-cache-gb 2e-05: a layer may need 4 experts at once, of 16384 bytes each; accepted: "
        "0.001 or more, or a smaller --inference-max-requests",
        "--inference-max-requests 100000000000: the cache of 100000000000 texts of up to 48 tokens "
        "does not fit the memory; accepted: fewer, or a smaller --inference-max-seq-length",
    ]


def _refused_caches(load: Path, experts: Path) -> list[str]:
    told = []
    for flags in (
        ("--offload-experts", "--expert-folder", experts, "--expert-cache-gb", 2e-5),
        ("--inference-max-requests", 10**11),
    ):
        with pytest.raises(ScMoEError) as refused:
            run_tool("serve", "--load", load, "--port", 0, *flags)
        told.append(str(refused.value))
    return told


def test_refusals_at_the_start(load):
    def told(*flags) -> str:
        with pytest.raises(ScMoEError) as refused:
            run_tool("serve", "--load", load, *flags)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert told("--port", port).startswith(f"--host 127.0.0.1 --port {port}: Address already")
    assert "accepted: an address of this machine" in told("--host", "192.0.2.1")
    for flags, words in (
        (("--port", 70000), "--port 70000: accepted is 0 to 65535"),
        (("--max-queue", -1), "--max-queue -1: accepted is 0 or more"),
        (("--inference-max-requests", 0), "--inference-max-requests 0: accepted is 1 or more"),
        (("--inference-max-seq-length", 64), f"--max-position-embeddings is {LENGTH}; accepted is"),
        (("--load", "absent"), "--load absent"),
        (("--chat-template", "absent"), "--chat-template absent: there is no such file"),
        (
            ("--chat-template", load.parent / "small.model"),
            "small.model: it is not UTF-8; accepted",
        ),
        (("--tokenizer-model", "no.model"), "--tokenizer-model no.model"),
        (
            ("--inference-dynamic-batching-max-tokens", 9),
            "--inference-dynamic-batching-max-tokens 9: accepted with --enable-chunked-prefill",
        ),
        (
            ("--enable-chunked-prefill", "--inference-dynamic-batching-max-tokens", 9),
            "a step reads a token of each of 16 texts at once; accepted is 16 or more, or a smaller "
            "--inference-max-requests",
        ),
        (("--expert-cache-gb", 1), "--expert-cache-gb 1.0: accepted with --offload-experts"),
        (
            ("--offload-experts",),
            "experts are mapped from files; accepted with --expert-folder DIR",
        ),
    ):
        assert words in told("--port", 0, *flags), flags
