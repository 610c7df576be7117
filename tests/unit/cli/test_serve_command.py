"""What scmoe serve refuses at its start, before seconds go into a model."""

import socket

import pytest

from megatron_scmoe.cli.serve import bind, listen
from megatron_scmoe.platform.command_line import UsageError

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
