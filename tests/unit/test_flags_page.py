"""docs/flags.md: what its script would write today."""

import importlib.util
import re

import pytest

from megatron_scmoe.config import ScMoEConfig
from tests.tools import REPOSITORY


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "docs" / "write_flags.py"
    spec = importlib.util.spec_from_file_location("write_flags", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    """If not: python docs/write_flags.py."""
    assert script.PAGE.read_text() == script.page()


def test_the_page_has_every_field_with_its_default(script):
    rows = re.findall(r"^\| `--scmoe-([\w-]+)`.*?\| ([^|]*) \| ([^|]*) \|", script.page(), re.M)
    defaults = {flag.replace("-", "_"): default.strip("`") for flag, _, default in rows}
    fields = ScMoEConfig.__dataclass_fields__
    of_the_run = {"cpu", "tune", "log_overlap_interval", "damaged_checkpoint"}
    assert set(fields) == set(defaults) - of_the_run
    assert {name: defaults[name] for name in ("tap", "combine", "chunks", "overlap")} == {
        "tap": "pos2", "combine": "cg1", "chunks": "1", "overlap": "on",
    }  # fmt: skip


def test_a_flag_without_a_theme_is_no_flag_left_out(script, monkeypatch):
    monkeypatch.delitem(script.THEMES, "The overlap")
    with pytest.raises(ValueError, match="scmoe_chunks"):
        script.page()
