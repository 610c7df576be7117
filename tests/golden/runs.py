"""Short runs whose losses are kept to the last bit, in losses.json beside this file.

`python -m tests.golden.renew` writes the file anew; CONTRIBUTING.md says when that is allowed.
"""

import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness import run_pretrain

FILE = Path(__file__).parent / "losses.json"
STEPS = 20
SERIES = {"loss": "lm loss", "grad_norm": "grad-norm"}
"""What is kept of each step, and its name in TensorBoard, which has it in fp32."""

COMMON = f"""
    --transformer-impl local --distributed-backend gloo --hidden-size 32 --num-attention-heads 4
    --ffn-hidden-size 48 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 48
    --seq-length 32 --max-position-embeddings 32 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8
    --train-iters {STEPS} --lr 1e-2 --lr-warmup-iters 2 --lr-decay-iters {STEPS} --log-interval 1
    --eval-iters 0 --eval-interval 100 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 128 --num-workers 0 --distributed-timeout-minutes 2
"""
PAIRS = "--num-layers 4 --moe-layer-freq [0,1]*2"

RUNS = {
    "pos2, cg1, overlap": f"""
        {PAIRS} --moe-aux-loss-coeff 1e-2
    """,
    "pos3, cg2, norm shared, 2 chunks, distributed optimizer": f"""
        {PAIRS} --moe-aux-loss-coeff 1e-2 --scmoe-tap pos3 --scmoe-combine cg2
        --scmoe-router-norm shared --scmoe-chunks 2
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    """,
    "pos1, add, post norm, experts in every block, recompute, serial": """
        --num-layers 4 --moe-layer-freq 1 --moe-aux-loss-coeff 1e-2
        --scmoe-tap pos1 --scmoe-combine add --scmoe-post-norm --no-scmoe-overlap
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    """,
    "zero experts, moving expert biases, latent attention, bf16": f"""
        {PAIRS} --scmoe-tap pos2 --scmoe-combine add --scmoe-router-norm shared
        --scmoe-zero-experts 2 --scmoe-expert-bias proportional --scmoe-router-bias
        --moe-router-score-function softmax --moe-router-pre-softmax --moe-router-dtype fp32
        --moe-router-topk-scaling-factor 2 --moe-router-load-balancing-type none
        --moe-router-bias-update-rate 0.01 --moe-aux-loss-coeff 0
        --multi-latent-attention --qk-layernorm --q-lora-rank 16 --kv-lora-rank 16
        --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --scmoe-mla-scale
        --rope-type rope --no-rope-fusion --bf16
    """,
}
"""Flags by name; each on two gloo ranks, with Megatron's dropout of 0.1."""


@dataclass(frozen=True)
class MachineType:
    """What the last bits depend on: kernels are chosen by the CPU, and PyTorch brings them."""

    cpu: str
    instructions: str
    torch: str


def machine_type() -> MachineType:
    """Of this machine."""
    return MachineType(
        cpu=_cpu(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
    )


def train(name: str) -> dict[str, list[float]]:
    """The series of a run by name, one number a step.

    Raises:
        AssertionError: if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = f"{COMMON} {RUNS[name]} --tensorboard-dir {folder}".split()
        run = run_pretrain(words, world_size=2)
        assert run.status == 0, run.output[-3000:]
        events = EventAccumulator(folder).Reload()
        return {key: [e.value for e in events.Scalars(tag)] for key, tag in SERIES.items()}


def read() -> tuple[MachineType, dict[str, dict[str, list[float]]]]:
    """The kept series, and the machine type they are from."""
    kept = json.loads(FILE.read_text())
    runs = {
        name: {key: [float.fromhex(value) for value in values] for key, values in series.items()}
        for name, series in kept["runs"].items()
    }
    return MachineType(**kept["machine"]), runs


def write(machine: MachineType, runs: dict[str, dict[str, list[float]]]) -> None:
    """Keep the series, as hexadecimal numbers: each is the fp32 number itself."""
    hexadecimal = {
        name: {key: [value.hex() for value in values] for key, values in series.items()}
        for name, series in runs.items()
    }
    kept = {"machine": vars(machine), "runs": hexadecimal}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")


def _cpu() -> str:
    """Vendor, family and model: 'GenuineIntel 6 207'; of other systems what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    names = ("vendor_id", "cpu family", "model")
    if not all(name in fields for name in names):
        return platform.processor() or platform.machine()
    return " ".join(fields[name] for name in names)
