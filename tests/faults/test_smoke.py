"""The image's smoke test, on this machine; among the tests of jobs, as it takes a minute."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

from tests.tools import REPOSITORY


def test_smoke_test_passes_here():
    run = subprocess.run(
        ["docker/smoke_test.sh"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHON": sys.executable, "SCMOE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"megatron-core {version('megatron-core')}\n" in run.stdout
    assert len(re.findall(r"iteration +\d+\slm loss: [\d.E+-]+", run.stdout)) == 3
    assert run.stdout.endswith("smoke test passed on 2 ranks\n")
