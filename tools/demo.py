"""A ScMoE language model, trained from nothing in a few minutes: what `make demo` runs.

    python tools/demo.py                          two CPU ranks, or every GPU there is
    python tools/demo.py --smoke                  ten iterations, to see that it works
    python tools/demo.py -- --scmoe-tap pos3      anything after -- goes to pretrain_gpt_scmoe.py

It prepares text that every Python brings along, evaluates the untrained model on held-out text,
trains it, saves a checkpoint, resumes from it, and writes below demo/

    loss_curve.png, losses.json           what was learnt
    checkpoints/                          the model, resumable on any parallel layout
    before.log, train.log, resume.log     what Megatron said, the command in the first line
    tensorboard/                          the same run for TensorBoard

Losses come from the log: Megatron gives TensorBoard none when it only evaluates (--skip-train).
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from prepare_demo_data import DemoData, prepare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, run_tool, staged_outputs

REPOSITORY = Path(__file__).resolve().parent.parent

# The model: two pairs of blocks, one with a dense MLP, one with a shared and four routed experts.
# Router and experts read the tap between attention and MLP of the dense block (Pos-2).
MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --swiglu --disable-bias-linear --normalization RMSNorm
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-layer-freq [0,1]*2 --moe-ffn-hidden-size 256
    --moe-shared-expert-intermediate-size 256
    --moe-router-topk 1 --moe-router-pre-softmax --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall
    --scmoe-tap pos2 --scmoe-combine cg1
"""

OPTIMIZER = """
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --weight-decay 0.1
    --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
"""

GLOBAL_BATCH_SIZE = 16
EXPERTS = 4

# What lies below the output folder: written anew each time, and kept.
OUTPUTS = {
    "before.log", "train.log", "resume.log", "checkpoints", "tensorboard", "losses.json",
    "loss_curve.png",
}  # fmt: skip
KEPT = {"data", "smoke"}


@dataclass(frozen=True)
class Plan:
    """How long to train: `first` iterations, a checkpoint, then from it up to `last`."""

    first: int
    last: int
    eval_every: int  # Megatron also evaluates after `first` and `last`: no divisor of these
    warmup: int
    every: int  # of the text: one module in so many


FULL = Plan(first=200, last=240, eval_every=50, warmup=20, every=1)
SMOKE = Plan(first=6, last=10, eval_every=100, warmup=2, every=10)


@dataclass(frozen=True)
class Hardware:
    """The ranks to start and the flags that follow from what they run on."""

    name: str
    ranks: int
    flags: list[str]

    @staticmethod
    def find() -> "Hardware":
        """All GPUs over NCCL; without one, two CPU ranks over gloo."""
        if not torch.cuda.is_available():
            flags = "--distributed-backend gloo --transformer-impl local"
            return Hardware("CPU", 2, Hardware._flags(2, flags))
        ranks = torch.cuda.device_count()
        with_te = importlib.util.find_spec("transformer_engine") is not None
        implementation = "transformer_engine" if with_te else "local"
        flags = f"--distributed-backend nccl --transformer-impl {implementation} --bf16"
        return Hardware(torch.cuda.get_device_name(), ranks, Hardware._flags(ranks, flags))

    @staticmethod
    def _flags(ranks: int, flags: str) -> list[str]:
        global_batch = math.lcm(GLOBAL_BATCH_SIZE, ranks)
        # Evaluation is one pass over all of the held-out text, the same each time; Megatron draws one
        # sequence per rank at a time for it.
        return f"""
            {flags}
            --expert-model-parallel-size {math.gcd(EXPERTS, ranks)}
            --global-batch-size {global_batch} --micro-batch-size {global_batch // ranks}
            --full-validation --multiple-validation-sets
            --eval-global-batch-size {ranks} --eval-micro-batch-size 1
        """.split()


@dataclass
class Record:
    """The losses of one iteration; iteration 0 is the untrained model."""

    iteration: int
    lm_loss: float | None = None
    aux_loss: float | None = None
    validation_loss: float | None = None


@dataclass
class Losses:
    """Records by iteration, filled from Megatron's log."""

    records: dict[int, Record] = field(default_factory=dict)

    # " iteration   12/  300 | ... | lm loss: 6.9E+00 | load_balancing_loss: 1.0E+00 | ..."
    _ITERATION = re.compile(r" iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|")
    _AUX = re.compile(r" load_balancing_loss: (\S+) \|")
    # " validation-0 loss at iteration 80 | lm loss value: 5.1E+00 | lm loss PPL: 1.6E+02 | "
    _VALIDATION = re.compile(r" validation\S* loss at iteration (\d+).*? lm loss value: (\S+) \|")

    def read(self, line: str) -> Record | None:
        """Take up a line of the log; return the record it belongs to, if to any."""
        if found := self._ITERATION.search(line):
            record = self._at(int(found[1]))
            record.lm_loss = float(found[2])
            if aux := self._AUX.search(line):
                record.aux_loss = float(aux[1])
            return record
        if found := self._VALIDATION.search(line):
            record = self._at(int(found[1]))
            record.validation_loss = float(found[2])
            return record
        return None

    def validation(self, iteration: int) -> float:
        """The held-out loss after `iteration`."""
        return self.records[iteration].validation_loss

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(iterations, values) of one field of the records, where it has a value."""
        present = [r for _, r in sorted(self.records.items()) if getattr(r, name) is not None]
        return [r.iteration for r in present], [getattr(r, name) for r in present]

    def _at(self, iteration: int) -> Record:
        return self.records.setdefault(iteration, Record(iteration))


class RunFailed(ScMoEError):
    """A training run ended with an error; the message points to its log."""

    status = 1


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Train, evaluate and resume a small ScMoE language model.")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="where to write (default: demo, with --smoke demo/smoke)",
    )  # fmt: skip
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"{SMOKE.last} iterations instead of {FULL.last}, on a tenth of the text",
    )
    parser.add_argument(
        "megatron", nargs="*", metavar="-- FLAG", help="flags added to pretrain_gpt_scmoe.py's"
    )
    args = parser.parse_args(argv)
    default = REPOSITORY / "demo"
    folder = args.output or (default / "smoke" if args.smoke else default)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        demo(folder.absolute(), SMOKE if args.smoke else FULL, args.megatron)
    except RunFailed as failure:
        sys.exit(f"demo.py: {failure}")
    except KeyboardInterrupt:
        print(f"demo.py: interrupted; the logs are in {_shown(folder)}", file=sys.stderr)
        sys.exit(130)


def demo(folder: Path, plan: Plan, extra_flags: Sequence[str]) -> None:
    """The whole demo, below `folder`. Raises RunFailed where a run fails."""
    console = Console(highlight=False, soft_wrap=True, markup=False)  # paths may have brackets
    hardware = Hardware.find()
    console.print(f"ScMoE demo on {hardware.ranks} ranks ({hardware.name})", style="bold")
    started = time.perf_counter()
    clear(folder)
    data = prepare(folder / "data", every=plan.every, workers=os.cpu_count() or 1)

    checkpoints = folder / "checkpoints"
    schedule = f"""
        --lr-warmup-iters {plan.warmup} --lr-decay-iters {plan.last} --log-interval 1
        --eval-interval {plan.eval_every} --eval-iters 1
    """
    common = shlex.split(MODEL + OPTIMIZER + schedule) + hardware.flags + data_flags(data)
    common += ["--tensorboard-dir", str(folder / "tensorboard"), *extra_flags]
    save = ["--save", str(checkpoints), "--save-interval", str(plan.last)]
    # Megatron's scheduler counts --train-iters too, and would refuse to resume with more of them.
    load = ["--load", str(checkpoints), "--override-opt-param-scheduler"]
    stages = {
        "before": (0, 0, ["--skip-train", "--train-iters", str(plan.first)]),
        "train": (0, plan.first, [*save, "--train-iters", str(plan.first)]),
        "resume": (plan.first, plan.last, [*load, *save, "--train-iters", str(plan.last)]),
    }
    losses = Losses()
    for name, (start, end, flags) in stages.items():
        run(name, [*common, *flags], hardware, folder, start, end, losses, console)

    settings = {"smoke": plan is SMOKE, "hardware": hardware.name, "ranks": hardware.ranks}
    with staged_outputs("--output", [folder / "losses.json", folder / "loss_curve.png"]) as (
        losses_file,
        picture,
    ):
        write_losses(losses_file, losses, plan, {**settings, "flags": common})
        plot(picture, losses, plan)
    console.print(summary(losses, plan))
    again = [sys.executable, __file__, "--output", f"{folder}-pos3", "--", "--scmoe-tap", "pos3"]
    console.print(
        f"{time.perf_counter() - started:.0f} s in all\n"
        f"picture      {_shown(folder / 'loss_curve.png')}\n"
        f"checkpoint   {_shown(checkpoints)}\n"
        f"next         {shlex.join(map(_shown, again))}"
    )


def data_flags(data: DemoData) -> list[str]:
    """The flags that point Megatron to the prepared data."""
    paths = {
        "--tokenizer-model": data.tokenizer,
        "--train-data-path": data.train,
        "--valid-data-path": data.valid,
    }
    flags = [word for flag, path in paths.items() for word in (flag, str(path))]
    return ["--tokenizer-type", "SentencePieceTokenizer", *flags, "--num-workers", "0"]


def clear(folder: Path) -> None:
    """Remove what an earlier demo left, but its data: a run must not resume from an old one.

    Raises UsageError for a folder that holds anything else.
    """
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if foreign := sorted(present - OUTPUTS - KEPT):
        raise UsageError(
            f"--output {_shown(folder)}: it holds {foreign[0]}, which is not of a demo; "
            "accepted are a new folder and that of an earlier demo"
        )
    for name in present & OUTPUTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


def run(
    name: str, flags: list[str], hardware: Hardware, folder: Path, start: int, end: int,
    losses: Losses, console: Console,
) -> None:  # fmt: skip
    """One run of pretrain_gpt_scmoe.py under torchrun, from iteration `start` to `end`.

    Its output goes to NAME.log below `folder`, its losses to `losses`, one line to the terminal.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(hardware.ranks)]
    command = [sys.executable, *launcher, str(REPOSITORY / "pretrain_gpt_scmoe.py"), *flags]
    threads = max(1, (os.cpu_count() or 1) // hardware.ranks)
    environment = {"OMP_NUM_THREADS": str(threads)}
    log = folder / f"{name}.log"
    with open(log, "w") as stream, _Display(name, start, end, console) as display:
        stream.write(f"$ {shlex.join(command)}\n\n")
        stream.flush()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            for line in process.stdout:
                stream.write(line)
                if record := losses.read(line):
                    stream.flush()
                    display.show(record)
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    if status != 0:
        raise RunFailed(
            f"the run '{name}' failed with status {status} (its log: {_shown(log)}):"
            f"\n\n{_last_lines(log)}"
        )


def write_losses(file: Path, losses: Losses, plan: Plan, settings: dict) -> None:
    """`records`, one an iteration with null for what was not measured, and what they are of."""
    records = [asdict(record) for _, record in sorted(losses.records.items())]
    content = {**settings, "resumed_at": plan.first, "records": records}
    file.write_text(json.dumps(content, indent=1) + "\n")


def plot(file: Path, losses: Losses, plan: Plan) -> None:
    """Training and held-out loss, the load-balancing loss beside them, and where it resumed."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(*losses.series("lm_loss"), color="tab:blue", linewidth=1, label="training")
    left.plot(
        *losses.series("validation_loss"), "o:", color="tab:orange", zorder=3, label="held-out text"
    )
    right.plot(
        *losses.series("aux_loss"), color="tab:green", linewidth=0.8, alpha=0.7,
        label="load balancing (1: even)",
    )  # fmt: skip
    left.axvline(plan.first, color="gray", linestyle="--", label="resumed from the checkpoint")
    left.set_xlabel("iteration")
    left.set_ylabel("language-model loss [nats per token]")
    right.set_ylabel("load-balancing loss")
    left.set_title("ScMoE GPT")
    left.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=130, format="png")


def summary(losses: Losses, plan: Plan) -> Table:
    """Held-out loss and perplexity before training, after it, and after resuming."""
    names = ("held-out text", "iteration", "loss [nats/token]", "perplexity")
    table = Table(*(Column(name, overflow="fold") for name in names))  # losses are never cut off
    for label, iteration in (
        ("before training", 0), ("after training", plan.first), ("after resuming", plan.last)
    ):  # fmt: skip
        loss = losses.validation(iteration)
        table.add_row(label, str(iteration), f"{loss:.4f}", f"{math.exp(loss):.1f}")
    return table


def _shown(path: str | Path) -> str:
    """A path as one would type it: relative where it lies below the working folder."""
    return str(path).removeprefix(f"{Path.cwd()}{os.sep}")


class _Display:
    """One line per run: a bar on a terminal, a line now and then where there is none."""

    def __init__(self, name: str, start: int, end: int, console: Console):
        self._name, self._end, self._console = name, end, console
        self._lm = self._validation = self._aux = None
        self._every = max(1, (end - start) // 6)
        self._line: tuple[int, str] | None = None  # iteration and text of a line that is due
        self._progress = Progress(
            TextColumn("{task.description:<7}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[losses]}", markup=False),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(
            name, completed=start, total=end or None, losses="starting"
        )

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._print_due()
        self._progress.stop()

    def show(self, record: Record) -> None:
        self._lm = record.lm_loss or self._lm
        self._aux = record.aux_loss or self._aux
        self._validation = record.validation_loss or self._validation
        parts = {"loss": self._lm, "aux": self._aux, "held-out": self._validation}
        text = "  ".join(f"{name} {value:.3f}" for name, value in parts.items() if value)
        self._progress.update(self._task, completed=record.iteration, losses=text)
        if self._line is not None and self._line[0] != record.iteration:
            self._print_due()
        due = record.iteration % self._every == 0 or record.validation_loss is not None
        if due and not self._console.is_terminal:
            where = f"{record.iteration}/{self._end}  " if self._end else ""
            self._line = record.iteration, f"{self._name:<7} {where}{text}"

    def _print_due(self) -> None:
        """Print the line that waited for what else would be told of its iteration."""
        if self._line is not None:
            self._console.print(self._line[1])
        self._line = None


def _stop(process: subprocess.Popen) -> None:
    """End torchrun by SIGTERM, on which it ends its workers; they are in sessions of their own."""
    process.terminate()
    try:
        process.wait(timeout=40)  # torchrun gives its workers 30 s
    except subprocess.TimeoutExpired:
        process.kill()


def _last_lines(log: Path, count: int = 20) -> str:
    """The reason why a run failed: what torchrun reports of the first rank that did, if it does.

    Otherwise the end of the log, without warnings and torchrun's report.
    """
    text = log.read_text(errors="replace")
    reported = re.search(r"^Root Cause.*?^  traceback : (.*?)^=+$", text, re.DOTALL | re.MULTILINE)
    if reported and not reported[1].startswith(("To enable", "Signal")):
        return "\n".join(reported[1].strip().splitlines()[-count:])
    lines = text.splitlines()
    report = next((i for i, x in enumerate(lines) if "torch/distributed/elastic" in x), len(lines))
    told = [x for x in lines[:report] if "Warning:" not in x and "warnings.warn(" not in x]
    return "\n".join((told or lines)[-count:])


if __name__ == "__main__":
    run_tool(main)
