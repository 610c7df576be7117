"""two_hosts.sh: what is wrong is said in one line."""

import subprocess

import pytest

from tests.benchmarks import BENCHMARKS


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "no script is given; accepted: --rate RATE -- SCRIPT [ARGUMENTS]"),
        (["--rate", "fast", "--", "x.py"], "--rate fast: not a rate; accepted: 400mbit, 1gbit"),
        (["--speed", "1"], "--speed: unknown; accepted: --rate RATE"),
    ],
)
def test_two_hosts_says_what_is_wrong(words, message):
    run = subprocess.run([BENCHMARKS / "two_hosts.sh", *words], capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr


def test_two_hosts_without_tc(tmp_path):
    for tool in ("bash", "env", "ip", "dirname"):
        (tmp_path / tool).symlink_to("/bin/true" if tool == "ip" else f"/usr/bin/{tool}")
    run = subprocess.run(
        ["/usr/bin/bash", BENCHMARKS / "two_hosts.sh", "--", "x.py"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert run.returncode == 2
    assert "tc is missing; install iproute2" in run.stderr
