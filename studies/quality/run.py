"""Train arms, sizes and seeds as many processes of one GPU each, within a time limit.

    python -m studies.quality.run --tokens TOKENS --arms top2 pos2 --seeds 1 2 3 --size 10m --gpus 8 \
        --out RESULTS --time-limit 500

A run whose result is in RESULTS, or in the repository's results, is not done again: give the same
command until nothing is left. What the limit cuts off leaves nothing. With --gpus 0 runs are on the
CPU.

Arms that continue or convert another one's weights have it trained first, and its weights kept in
--checkpoints until you remove them.
"""

import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, positive, run_tool
from studies.quality.arms import ARMS, SIZES, active_parameters, model_flags, total_parameters
from studies.quality.arms import training_flags as flags_of_training

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TRAIN = "studies.quality.train"
"""The module that does one run."""

CONVERT = str(HERE.parents[1] / "tools" / "convert.py")
"""The script that makes one model of another."""

OTHER_ORDER = 1000
"""Added to the seed of a run that starts from another one's weights: a new order of the text."""

POLL_S = 0.2
LAST_WORDS = 15
"""Lines of the log of a run that failed which are shown."""


@dataclass(frozen=True)
class Run:
    """One arm of one size with one seed."""

    arm: str
    size: str
    seed: int
    tokens: int
    learning_rate: float
    base_tokens: int = 0
    """Of the run whose weights it starts from."""

    @property
    def name(self) -> str:
        """Of its result; two runs with one name are the same."""
        millions = f"{self.tokens / 1e6:g}M"
        if self.base_tokens:
            millions += f"-after-{self.base_tokens / 1e6:g}M"
        return f"{self.size}-{self.arm}-{millions}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def base(self) -> "Run | None":
        """The run whose weights it starts from."""
        if not ARMS[self.arm].after:
            return None
        rate = SIZES[self.size].learning_rate
        return Run(ARMS[self.arm].after, self.size, self.seed, self.base_tokens, rate)

    def flags(self, on_cpu: bool) -> list[str]:
        """Of the pretraining script, without the data."""
        size, seed = SIZES[self.size], self.seed + OTHER_ORDER * (self.base_tokens > 0)
        return [
            *model_flags(ARMS[self.arm], size, on_cpu),
            *flags_of_training(size, seed, self.tokens, self.learning_rate),
        ]

    def describe(self) -> dict:
        """What a result says besides what was measured."""
        arm, size = ARMS[self.arm], SIZES[self.size]
        return {
            "arm": self.arm,
            "size": self.size,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "tokens_asked": self.tokens,
            "after": ARMS[self.arm].after,
            "base_tokens": self.base_tokens,
            "active_parameters": active_parameters(arm, size),
            "total_parameters": total_parameters(arm, size),
            "embedding_parameters": size.vocabulary * size.hidden,
        }


def main(argv: list[str] | None = None) -> None:
    """Do what is left of the runs that the flags name."""
    parser = OneLineParser(description="Train the arms of the study of quality.")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of data.py's tokens")
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS), help="models")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1], help="of weights and data order"
    )
    parser.add_argument("--size", nargs="+", default=["10m"], choices=list(SIZES), help="sizes")
    parser.add_argument(
        "--train-tokens",
        type=positive,
        metavar="N",
        help="default: of the size; half of it if continued or converted",
    )
    parser.add_argument(
        "--base-tokens",
        type=positive,
        metavar="N",
        help="of the runs that continued and converted arms start from (default: of the size)",
    )
    parser.add_argument("--lr", nargs="+", type=float, metavar="RATE", help="default: of the size")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of the weights that others start from (default: checkpoints in --out)",
    )
    parser.add_argument("--gpus", type=int, default=1, help="0 for the CPU")
    parser.add_argument("--jobs-per-gpu", type=positive, default=1, metavar="N", help="at once")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="S", help="for all runs")
    parser.add_argument("--log", type=Path, help="keep the runs' logs in this folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what is left to do")
    args = parser.parse_args(argv)

    if not (args.tokens / "train_text_document.idx").is_file():
        raise UsageError(f"--tokens {args.tokens}: it has no train_text_document.idx of data.py")
    if args.gpus > (visible := len(visible_gpus(args.gpus - 1))):
        raise UsageError(f"--gpus {args.gpus}: CUDA_VISIBLE_DEVICES names {visible}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.checkpoints = (args.checkpoints or args.out / "checkpoints").absolute()
    left = with_bases([run for run in runs(args) if not is_done(run, args.out)], args.checkpoints)
    if args.dry_run:
        print("\n".join([run.name for run in left] or ["nothing is left to do"]))
        return
    failed = work(left, args, time.monotonic() + args.time_limit)
    undone = with_bases([run for run in left if not is_done(run, args.out)], args.checkpoints)
    print(
        f"done: {len(left) - len(undone)}, failed: {len(failed)}, left: {len(undone)}", flush=True
    )
    if failed:
        raise UsageError(f"failed: {', '.join(failed)}")


def runs(args) -> list[Run]:
    """The runs that the flags name, the first seed of all arms first."""
    found = []
    for size, seed, rate, arm in itertools.product(
        args.size, args.seeds, args.lr or [None], args.arms
    ):
        usual, base_tokens = SIZES[size].tokens, 0
        if ARMS[arm].after:
            usual, base_tokens = usual // 2, args.base_tokens or usual
        tokens = args.train_tokens or usual
        found.append(Run(arm, size, seed, tokens, rate or SIZES[size].learning_rate, base_tokens))
    return found


def with_bases(left: list[Run], checkpoints: Path) -> list[Run]:
    """The runs, with those before them whose weights they start from and that are not there."""
    found: list[Run] = []
    for run in left:
        if run.base and not has_weights(run.base, checkpoints):
            found.append(run.base)
        found.append(run)
    return list(dict.fromkeys(found))


def has_weights(run: Run, checkpoints: Path) -> bool:
    """Whether its weights were kept."""
    return (checkpoints / run.name).is_dir()


def is_done(run: Run, out: Path) -> bool:
    """Whether there is a result of it."""
    return any((folder / f"{run.name}.json").is_file() for folder in (out, RESULTS))


def work(left: list[Run], args, deadline: float) -> list[str]:
    """Keep every slot busy until nothing is left, or what is left would not end in time.

    Returns:
        Names of the runs that failed.
    """
    slots = max(1, args.gpus) * args.jobs_per_gpu
    bases = {run.base for run in left if run.base and not has_weights(run.base, args.checkpoints)}
    queue, failed = list(left), []
    busy: dict[int, _Process] = {}
    took: dict[tuple[str, int], float] = {}  # the longest of a size and length
    try:
        while queue or busy:
            now = time.monotonic()
            for slot in [slot for slot in range(slots) if slot not in busy]:
                fits = [
                    run
                    for run in queue
                    if now + took.get((run.size, run.tokens), 0.0) < deadline
                    and (run.base is None or has_weights(run.base, args.checkpoints))
                ]
                if fits:
                    run, gpu = fits[0], slot % max(1, args.gpus)
                    queue.remove(run)
                    busy[slot] = _Process(run, gpu, args, keep=run in bases)
            if not busy or now >= deadline:
                break
            for slot, process in list(busy.items()):
                status = process.poll()
                if status is None:
                    continue
                del busy[slot]
                key = (process.run.size, process.run.tokens)
                if status == 0:
                    process.store(args.out)
                    took[key] = max(took.get(key, 0.0), process.seconds)
                else:
                    failed.append(process.run.name)
                    process.show_failure(status)
                process.close()
            time.sleep(POLL_S)
    finally:
        for process in busy.values():
            process.end()
    return failed


def command(module: str, result: Path, tokens: Path, arm: str, flags: list[str]) -> list[str]:
    """Of a module that trains an arm and writes a result, as train.py does."""
    kind = "stock" if ARMS[arm].stock else "scmoe"
    words = [sys.executable, "-W", "ignore", "-m", module, str(result), str(tokens.absolute())]
    return [*words, kind, *flags]


def environment(gpu: int | None) -> dict[str, str]:
    """Of such a process: on one of the GPUs that this one may see, or on the CPU (None)."""
    where = {"SCMOE_CPU": "1"} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible_gpus(gpu)[gpu]}
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    others = {"PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
    return os.environ | where | others


def visible_gpus(most: int = 0) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` names; the numbers from 0 to ``most`` where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(most + 1))) if named is None else named.replace(" ", "").split(",")


class _Process:
    """A run on its way, in a folder of its own that goes with it."""

    def __init__(self, run: Run, gpu: int, args, keep: bool):
        self.run, self._begin = run, time.monotonic()
        self._flags = run.flags(on_cpu=args.gpus == 0)
        self._folder = tempfile.TemporaryDirectory(prefix="quality-")
        self._facts = Path(self._folder.name) / "facts.json"
        self._log = (args.log or Path(self._folder.name)) / f"{run.name}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_text("")
        self._environment = environment(None if args.gpus == 0 else gpu)
        self._checkpoint = args.checkpoints / run.name if keep else None
        flags, self._commands = list(self._flags), []
        if run.base is not None:
            load = args.checkpoints / run.base.name
            if words := ARMS[run.arm].conversion.split():
                converted = Path(self._folder.name) / "converted"
                words += ["--seed", str(run.seed), "--input", str(load), "--save", str(converted)]
                self._commands.append([sys.executable, "-W", "ignore", CONVERT, "upcycle", *words])
                load = converted
            flags += ["--load", str(load), "--finetune"]
        if self._checkpoint is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            flags += f"--save {self._partial} --save-interval 1000000 --no-save-optim".split()
        self._commands.append(command(TRAIN, self._facts, args.tokens, run.arm, flags))
        self._process = self._next()
        print(f"begins: {run.name}", flush=True)

    @property
    def _partial(self) -> Path:
        """Where weights are until they are all there."""
        assert self._checkpoint is not None
        return self._checkpoint.with_suffix(self._checkpoint.suffix + ".partial")

    def _next(self) -> subprocess.Popen:
        """Start the next of its commands."""
        with open(self._log, "a") as log:
            return subprocess.Popen(
                self._commands.pop(0),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder.name,
                env=self._environment,
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._begin

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        if self._process.poll() == 0 and self._commands:
            self._process = self._next()
        return self._process.poll()

    def store(self, out: Path) -> None:
        """Write the result, whole or not at all; and the weights, if others start from them."""
        if self._checkpoint is not None:
            os.replace(self._partial, self._checkpoint)
        facts = json.loads(self._facts.read_text())
        about = self.run.describe() | {
            "flags": self._flags,
            "flags_sha256": hashlib.sha256(" ".join(self._flags).encode()).hexdigest()[:16],
            "seconds": round(self.seconds, 1),
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
        }
        with atomic_write(out / f"{self.run.name}.json") as (file,):
            file.write_text(json.dumps(about | facts) + "\n")
        losses = [source["loss"] for source in facts["validation"].values()]
        mean = sum(losses) / len(losses)
        speed = facts["tokens_per_second"]
        print(
            f"done: {self.run.name}: {mean:.4f}, {self.seconds:.0f} s, {speed} tokens/s", flush=True
        )

    def show_failure(self, status: int) -> None:
        """The last lines of its log."""
        lines = self._log.read_text(errors="replace").rstrip().split("\n")[-LAST_WORDS:]
        print(f"failed: {self.run.name}: exit status {status}", *lines, sep="\n    ", flush=True)

    def end(self) -> None:
        """Stop it, politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(3)
                except subprocess.TimeoutExpired:
                    continue
        print(f"cut off: {self.run.name} after {self.seconds:.0f} s", flush=True)
        self.close()

    def close(self) -> None:
        """Remove its folder, and weights that are not all there."""
        if self._checkpoint is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._folder.cleanup()


def versions() -> dict[str, str | None]:
    """Of what the losses depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    run_tool(main)
