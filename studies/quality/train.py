"""Train one model and evaluate it on every held-out source; run.py starts it.

    python -m studies.quality.train FACTS TOKENS scmoe|stock FLAGS ...

TOKENS is the folder that data.py has packed. FLAGS are of the pretraining script; ``--data-path`` is
added here. Into FACTS goes what was found, as JSON. Without ``--save``
nothing else is written.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_scmoe.platform import cpu_backend, launch
from megatron_scmoe.platform.command_line import OneLineParser, run_command

EVERY = 10
"""Iterations that one entry of the stored curves is of."""

CURVE_POINTS = 10
"""How often a part of the held-out text is evaluated on the way; twice as often with ``--load``, and
at the start."""

CURVE_ROWS = 64
"""Rows of each source of that part. On a CPU, where runs are tries, the end has no more either."""

EVALUATED_ROWS = 32
"""Rows evaluated at once."""

WARM_UP = 10
"""Iterations that do not count for the speed."""


def main(facts: Path, tokens: Path, kind: str) -> None:
    """Train as the flags in ``sys.argv`` say, evaluate, write the facts."""
    launch.before_megatron()
    run = _Run(tokens)
    start(tokens, kind)
    facts.write_text(json.dumps(run.facts))


def arguments(description: str, result: str) -> tuple[Path, Path, str]:
    """Those before the script's flags, which alone stay in ``sys.argv``.

    Args:
        result: what the file that is written is called.
    """
    parser = OneLineParser(description=description.split("\n")[0])
    parser.add_argument("result", type=Path, metavar=result, help="file to write")
    parser.add_argument(
        "tokens", type=Path, metavar="TOKENS", help="folder that data.py has packed"
    )
    parser.add_argument("kind", choices=("scmoe", "stock"), help="stock: Megatron's own model")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of the pretraining script"
    )
    args = parser.parse_args()
    sys.argv[1:] = args.flags
    return args.result, args.tokens, args.kind


def start(tokens: Path, kind: str) -> None:
    """Run the pretraining script on the training text, as the flags in ``sys.argv`` say.

    Args:
        tokens: the folder that data.py has packed.
        kind: ``scmoe``, or ``stock`` for Megatron's own model.
    """
    with (
        tempfile.TemporaryDirectory() as cache
    ):  # indices of the data: runs beside this one have theirs
        sys.argv += ["--data-path", str(tokens / "train_text_document"), "--data-cache-path", cache]
        if kind == "scmoe":
            from megatron_scmoe.training import pretrain as loop
        else:
            from megatron_scmoe.training import stock as loop  # type: ignore[no-redef]
        loop.main()


class _Run:
    """Hears what Megatron's loop does, and evaluates its model when it is done."""

    def __init__(self, tokens: Path) -> None:
        from megatron.training import training

        self.facts: dict = {}
        self._tokens = tokens
        self._model = None
        self._losses: list = []
        self._norms: list[float] = []
        self._times: list[float] = []
        self._curve: list[tuple[int, float]] = []
        self._train, training.train = training.train, self._trained
        self._log, training.training_log = training.training_log, self._logged

    def _trained(self, forward_step, model, *args, **kwargs):
        """Stands where the loop is called."""
        from megatron.training import get_args

        self._model = model[0].module  # without the wrapper that reduces gradients
        if get_args().load:
            self._add_to_curve(0)
        done = self._train(forward_step, model, *args, **kwargs)
        self._collect(get_args())
        return done

    def _logged(self, losses, total, rate, iteration, scale, memory, skipped, norm, *rest, **more):
        """Stands where an iteration is logged; losses stay on the device until the end."""
        from megatron.training import get_args

        self._times.append(time.perf_counter())
        self._losses.append(losses["lm loss"].detach().clone())
        self._norms.append(float(norm))
        last, points = get_args().train_iters, CURVE_POINTS * (2 if get_args().load else 1)
        if iteration % max(1, last // points) == 0 and iteration < last:
            self._add_to_curve(iteration)
        return self._log(
            losses, total, rate, iteration, scale, memory, skipped, norm, *rest, **more
        )

    def _add_to_curve(self, iteration: int) -> None:
        from megatron.training import get_args

        found = self._evaluate(get_args(), CURVE_ROWS)
        mean = float(np.mean([source["loss"] for source in found.values()]))
        self._curve.append((iteration, round(mean, 5)))

    def _evaluate(self, args, rows: int | None = None) -> dict[str, dict]:
        """Loss in nats a token, and tokens, by source; of the first ``rows`` rows of each."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from megatron_scmoe.evaluation import perplexity
        from megatron_scmoe.evaluation.sequences import Sequences

        assert self._model is not None
        found = {}
        self._model.eval()
        for name in sources(self._tokens):
            data = IndexedDataset(str(self._tokens / f"{name}_text_document"))
            stream = np.concatenate([data[row] for row in range(len(data))])
            sequences = Sequences.from_stream(stream, args.seq_length)
            if rows is not None:
                sequences = sequences.first(rows)
            report = perplexity.evaluate(self._model, sequences, args.vocab_size, EVALUATED_ROWS)
            found[name] = {"loss": report.loss, "tokens": report.tokens}
        self._model.train()
        return found

    def _collect(self, args) -> None:
        import torch

        from studies.quality.watch import Guesses, Watch

        assert self._model is not None
        losses = [float(loss) for loss in self._losses]
        vocabulary = self._tokens / "tokenizer.vocab"
        with Watch(self._model) as watch, Guesses(self._model, vocabulary) as guesses:
            validation = self._evaluate(args, CURVE_ROWS if cpu_backend.is_enabled() else None)
        mean = float(np.mean([source["loss"] for source in validation.values()]))
        self._add_to_curve(len(losses))
        self._curve.append((len(losses), round(mean, 5)))  # of the whole text
        steps = np.diff(self._times)[min(WARM_UP, max(0, len(self._times) - 2)) :]
        tokens = args.global_batch_size * args.seq_length
        on_cpu = cpu_backend.is_enabled()
        self.facts = {
            "validation": validation,
            "validation_curve": self._curve,
            "train_loss": _by_tens(losses, np.mean, 4),
            "train_loss_max": _by_tens(losses, np.max, 4),
            "gradient_norm": _by_tens(self._norms, np.mean, 4),
            "gradient_norm_max": _by_tens(self._norms, np.max, 4),
            "guesses": guesses.shares(),
            "routers": watch.routers(),
            "gates": watch.gates(),
            "iterations": len(losses),
            "tokens": len(losses) * tokens,
            "tokens_per_second": round(tokens / float(np.median(steps))) if len(steps) else None,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "peak_memory_mb": None if on_cpu else torch.cuda.max_memory_allocated() // 2**20,
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        }


def sources(tokens: Path) -> list[str]:
    """The held-out sources that a folder of tokens has."""
    names = sorted(path.name.removesuffix("_text_document.idx") for path in tokens.glob("*.idx"))
    return [name for name in names if name != "train"]


def _by_tens(values: list[float], of, digits: int) -> list[float]:
    """One number for every ``EVERY`` iterations."""
    parts = [values[start : start + EVERY] for start in range(0, len(values), EVERY)]
    return [round(float(of(part)), digits) for part in parts]


if __name__ == "__main__":
    run_command(lambda: main(*arguments(__doc__, "FACTS")))
