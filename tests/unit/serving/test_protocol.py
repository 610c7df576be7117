"""What a request may hold, and what is told of one that cannot be."""

import json

import pytest

from megatron_scmoe.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse

MESSAGES = [{"role": "user", "content": "Hi"}]


def completion(**fields) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "A", **fields}).encode())


def test_defaults_are_openais():
    wish = completion()
    assert (wish.max_tokens, wish.n, wish.temperature, wish.top_p) == (16, 1, 1.0, 1.0)
    assert (wish.stream, wish.echo, wish.logprobs, wish.seed) == (False, False, None, None)
    assert parse(ChatRequest, json.dumps(dict(model="m", messages=MESSAGES)).encode()).n == 1


def test_null_is_as_if_the_field_were_not_there():
    assert completion(max_tokens=None, stop=None, logit_bias=None, tools=None) == completion()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(), (1.0, 0, 0.0)),
        (dict(temperature=1.0), (1.0, 0, 0.0)),
        (dict(temperature=0), (1.0, 1, 0.0)),
        (dict(temperature=0, top_p=0.5), (1.0, 1, 0.0)),
        (dict(top_k=1, top_p=0.5), (1.0, 1, 0.0)),
        (dict(temperature=2, top_k=5), (2.0, 5, 0.0)),
        (dict(top_p=0.5), (1.0, 0, 0.5)),
        (dict(top_p=1), (1.0, 0, 0.0)),
        (dict(top_k=5, top_p=1.0), (1.0, 5, 0.0)),
    ],
)
def test_sampling_is_in_megatrons_terms(fields, expected):
    sampling = completion(**fields).sampling
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == expected
    assert type(sampling["temperature"]) is type(sampling["top_p"]) is float


def test_prompts_may_be_texts_or_ids_one_or_several():
    assert completion(prompt="A").prompts == ["A"]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=["A", "B"]).prompts == ["A", "B"]
    assert completion(prompt=[[1], [2]]).prompts == [[1], [2]]


def test_what_the_server_does_anyway_may_be_asked_for():
    neutral = dict(presence_penalty=0, frequency_penalty=0.0, best_of=1, logit_bias={}, suffix="")
    assert completion(**neutral) == completion()


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        (dict(best_of=2), "best_of", "This server does not support 'best_of'."),
        (dict(tools=[{}]), "tools", "This server does not support 'tools'."),
        (dict(response_format={"type": "json_object"}), "response_format", "does not support"),
        (dict(temprature=1), "temprature", "Unrecognized request argument supplied: temprature"),
        (dict(model=None), "model", "Missing required parameter: 'model'."),
        (dict(temperature=float("nan")), "temperature", "Invalid 'temperature' NaN"),
        (
            dict(stream="yes"),
            "stream",
            "Invalid 'stream' \"yes\": Input should be a valid boolean.",
        ),
        (dict(max_tokens=1.5), "max_tokens", "Invalid 'max_tokens' 1.5"),
        (dict(prompt=["A", 1]), "prompt", "accepted is a text, a list of ids, or a list of either"),
        (dict(stop=["x"] * 17), "stop", "accepted are at most 16 strings"),
        (dict(top_k=3, top_p=0.5), "top_k", "'top_k' and 'top_p' exclude each other"),
        (dict(user="u" * 99, n="n" * 99), "n", "..."),
        ({"x\n" * 999: 1}, "x " * 18 + "x...", "supplied: x x x"),
        (
            dict(stream_options={"usage": True}),
            "stream_options",
            "Unrecognized request argument supplied: stream_options.usage",
        ),
        (
            dict(stream_options={"include_usage": True}),
            "stream_options",
            "'stream_options' goes with 'stream' only.",
        ),
    ],
)
def test_what_is_refused(fields, param, told):
    with pytest.raises(ApiError) as refused:
        wish = completion(**fields)
        assert wish.stop_words or wish.sampling
    assert (refused.value.status, refused.value.param) == (400, param)
    assert told in refused.value.message
    assert len(refused.value.message) < 200


def test_a_message_may_have_no_text_and_a_wrong_one_is_named():
    said = [{"role": "assistant", "content": None}, {"role": "user", "content": "a"}]
    wish = parse(ChatRequest, json.dumps(dict(model="m", messages=said)).encode())
    assert [message.content for message in wish.messages] == ["", "a"]
    said[1]["content"] = 3
    with pytest.raises(
        ApiError, match=r"Invalid 'messages\[1\].content' 3: Input should be"
    ) as wrong:
        parse(ChatRequest, json.dumps(dict(model="m", messages=said)).encode())
    assert wrong.value.param == "messages"


@pytest.mark.parametrize("more", [{}, {"text": "a"}])
def test_what_is_no_text_in_a_message_is_refused_by_its_type(more):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}, **more}]
    body = dict(model="m", messages=[dict(role="user", content=parts)])
    with pytest.raises(ApiError, match="a part of type 'image_url': this server reads 'text' only"):
        parse(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff{}", b"[" * 200_000])
def test_a_body_that_is_no_object(body):
    with pytest.raises(ApiError, match=r"The body of the request is not a JSON object\."):
        parse(CompletionRequest, body)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"model": "\\udc80"', "model"),
        ('"prompt": ["A", "\\uDC80"]', "prompt"),
        ('"stop": "\\ud83d"', "stop"),
        ('"\\udc80": 1', None),
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(field, param):
    """It would be part of the answer, which is UTF-8."""
    with pytest.raises(ApiError, match="it is no text that UTF-8 can hold") as refused:
        parse(CompletionRequest, f'{{"model": "m", "prompt": "A", {field}}}'.encode())
    assert refused.value.param == param
    json.dumps(refused.value.body(), ensure_ascii=False).encode()


def test_a_whole_pair_is_text_and_so_is_what_looks_like_half_of_one():
    body = rb'{"model": "m", "prompt": "\ud83d\ude00 \\udc80"}'
    assert parse(CompletionRequest, body).prompts == ["\N{GRINNING FACE} \\udc80"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_errors_have_openais_form(status, kind):
    assert ApiError(status, "a", "b", "c").body() == {
        "error": {"message": "a", "type": kind, "param": "b", "code": "c"}
    }


def test_parts_of_a_message_are_joined_and_other_fields_are_the_templates():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": "me"}]
    (message,) = parse(
        ChatRequest, json.dumps(dict(model="m", messages=messages)).encode()
    ).messages
    assert message.as_template_reads_it() == {"role": "user", "content": "ab", "name": "me"}
