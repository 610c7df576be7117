"""Flags that have been renamed are still read."""

import argparse

import pytest

from megatron_scmoe import arguments
from megatron_scmoe.arguments import RENAMED_FLAGS, add_scmoe_args, scmoe_config_from_args


def parse(*words: str):
    parser = add_scmoe_args(argparse.ArgumentParser(allow_abbrev=False))
    return scmoe_config_from_args(parser.parse_args(words))


@pytest.fixture(autouse=True)
def _nothing_said():
    arguments._say_once.cache_clear()


def test_an_old_flag_gives_what_the_new_one_gives(capsys):
    words = ["dispatch", "combine-backward"]
    assert parse("--scmoe-copied", *words) == parse("--scmoe-copy-engine-all-to-alls", *words)
    assert parse("--scmoe-copied", *words).copy_engine_all_to_alls == words
    assert capsys.readouterr().out == (
        "WARNING: --scmoe-copied is called --scmoe-copy-engine-all-to-alls now; "
        "the old name will go\n"
    )


def test_an_old_flag_takes_what_the_new_one_takes(capsys):
    with pytest.raises(SystemExit):
        parse("--scmoe-copied", "gather")
    assert "invalid choice: 'gather'" in capsys.readouterr().err


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    parse("--scmoe-copied", "combine")
    assert capsys.readouterr().out == ""


def test_help_shows_new_names_only():
    text = add_scmoe_args(argparse.ArgumentParser()).format_help()
    assert all(new in text and f"{old} " not in text for old, new in RENAMED_FLAGS.items())
