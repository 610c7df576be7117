"""The demo as a newcomer runs it, in its short form."""

import json
import subprocess
import sys

from tests.harness import TIMEOUT_S
from tests.tools import REPOSITORY


def test_smoke(tmp_path):
    command = [sys.executable, "tools/demo.py", "--smoke", "--output", str(tmp_path / "demo")]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "demo" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "demo" / "losses.json").read_text())
    assert list((tmp_path / "demo" / "checkpoints").glob("iter_*"))
