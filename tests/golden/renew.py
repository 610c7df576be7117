"""Write losses.json anew: `python -m tests.golden.renew`. CONTRIBUTING.md says when to."""

import os
import sys

from megatron_scmoe.platform import cpu_backend


def main() -> int:
    """Train every run twice; keep the losses if both times agree. Returns the exit status."""
    os.environ[cpu_backend.VARIABLE] = "1"  # the kept losses are a CPU's, also beside a GPU
    from tests.golden import runs

    series = {}
    for name in runs.RUNS:
        print(name, flush=True)
        series[name] = runs.train(name)
        if runs.train(name) != series[name]:
            print(f"error: {name}: two runs differ; nothing was written", file=sys.stderr)
            return 1
    runs.write(runs.machine_type(), series)
    print(f"wrote {runs.FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
