"""What scmoe serve refuses at its start, before seconds go into a model."""

import socket
from types import SimpleNamespace

import pytest

from megatron_scmoe.cli.serve import bind, check_template_of, listen, read_template
from megatron_scmoe.platform.command_line import UsageError
from tests.tools import pipe

HOST = "127.0.0.1"


def taken(port: int) -> str:
    return (
        rf"^--host {HOST} --port {port}: Address already in use; accepted: an address of this machine, "
        r"and a port that is free \(0 takes one\)$"
    )


def test_a_port_is_taken_as_soon_as_another_server_starts():
    """That one still loads its model, and listens to nobody."""
    with bind(HOST, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=taken(port)):
            bind(HOST, port)
        listen(first)
        with pytest.raises(UsageError, match=taken(port)):
            bind(HOST, port)
        socket.create_connection((HOST, port)).close()


def connections_are_left_at() -> int:
    """A port at which a server has ended that closed a connection itself."""
    with bind(HOST, 0) as server:
        listen(server)
        port = server.getsockname()[1]
        with socket.create_connection((HOST, port)):
            server.accept()[0].close()
    return port


def test_a_server_follows_one_that_has_just_ended():
    port = connections_are_left_at()
    with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
        plain.bind((HOST, port))
    with bind(HOST, port) as server:
        listen(server)


def test_of_two_that_follow_at_once_the_second_is_refused():
    port = connections_are_left_at()
    with bind(HOST, port) as first, bind(HOST, port) as second:
        listen(first)
        with pytest.raises(UsageError, match=taken(port)):
            listen(second)


BROKEN = {
    "{% for m in messages %}\n{{ m.content }": "line 2: unexpected '}'",
    "{% for m in messages %}": "line 1: Unexpected end of template. Jinja was looking for",
    "{{ messages | nothing }}": "line 1: No filter named 'nothing'.",
    "{{ " + "(" * 9999: "nested too deeply to be read",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_cannot_be_parsed(template, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    with pytest.raises(UsageError) as refused:
        read_template(file)
    told = str(refused.value)
    assert told.startswith(f"--chat-template {file}: {BROKEN[template]}")
    assert told.endswith("; accepted is a text file with a Jinja template")


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% generation %}{{ m | tojson }}{{ strftime_now('%Y') }}{% endgeneration %}{% endfor %}"
)
"""With what transformers adds to Jinja."""


def test_a_template_that_transformers_reads(tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert read_template(tmp_path / "chat.jinja") == TEMPLATE
    assert read_template(None) is None


def test_a_template_of_the_tokenizer():
    for templates in (None, TEMPLATE, {"default": TEMPLATE, "tool_use": ""}):
        check_template_of(SimpleNamespace(chat_template=templates), "tok")
    with pytest.raises(UsageError) as refused:
        check_template_of(SimpleNamespace(chat_template={"default": "{{ a }"}), "tok")
    assert str(refused.value) == (
        "--tokenizer-model tok: its chat template: line 1: unexpected '}'; accepted is "
        "--chat-template with a Jinja template"
    )


def test_a_template_may_come_from_a_pipe():
    with pipe(TEMPLATE.encode()) as file:
        assert read_template(file) == TEMPLATE
