"""The project's training against a plain PyTorch model: one seed, one curve of training loss.

    python -m studies.quality.parity --tokens TOKENS --out studies/quality/results/parity/FILE.json

Arms are trained as run.py trains them. Then the plain model of tests/reference.py is trained with
torch.optim.AdamW from the same weights on the same batches. What the optimizer does (learning rate,
which weights decay, clipping) is written here anew. Two programs round differently, and training
makes a difference grow. So the plain model is trained once more with other rounding, as a measure of
how much is to be expected: in fp64, or with --bf16 under autocast.
"""

import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, positive, run_tool
from studies.quality.arms import ARMS, SIZES, UNFUSED, WARM_UP, Size, flag
from studies.quality.report_parity import differences
from studies.quality.run import Run, command, environment, versions
from tests.reference import ReferenceConfig, ReferenceScMoE, load_megatron_state

RECORD = "studies.quality.record"
"""The module that trains an arm and records it."""

DIGITS = 9
"""Of a stored loss: what fp32 has."""

EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""So that products in fp32 are that on a GPU too: Transformer Engine would take TF32."""

REPORT_EVERY = 50
"""Steps between lines of progress."""


def main(argv: list[str] | None = None) -> None:
    """Train both ways, and store the curves."""
    parser = OneLineParser(description="Compare the project's training with a plain model's.")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of data.py's tokens")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", type=positive, default=300, help="of training (default: 300)")
    parser.add_argument("--size", default="tiny", choices=list(SIZES), help="default: tiny")
    parser.add_argument(
        "--arms", nargs="+", default=["pos2", "top2"], choices=comparable(), help="models"
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order")
    parser.add_argument("--gpu", action="store_true", help="on a GPU; without it on the CPU")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="the project's run in bf16 on a GPU, as the study has it; without it in fp32",
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="Megatron's own modules on the GPU as well, not Transformer Engine's; optimizer, clipping "
        "and the router's product stay Transformer Engine's where it is installed",
    )
    parser.add_argument(
        "--warm-up",
        type=float,
        default=WARM_UP,
        metavar="SHARE",
        help=f"of the steps (default: {WARM_UP}, as the study has it)",
    )
    args = parser.parse_args(argv)
    if not (args.tokens / "train_text_document.idx").is_file():
        raise UsageError(f"--tokens {args.tokens}: it has no train_text_document.idx of data.py")
    args.gpu |= args.bf16
    if args.gpu and (cpu_backend.is_enabled() or not torch.cuda.is_available()):
        flag = "--bf16" if args.bf16 else "--gpu"
        raise UsageError(f"{flag}: there is no GPU; leave it out")
    if args.local and not args.gpu:
        raise UsageError("--local: on the CPU they are Megatron's own anyway; leave it out")
    if not 0 < args.warm_up < 1:
        raise UsageError(f"--warm-up {args.warm_up}: accepted is a number between 0 and 1")

    size = SIZES[args.size]
    tokens = args.steps * size.batch * size.sequence
    result = {
        "size": args.size,
        "seed": args.seed,
        "steps": args.steps,
        "precision": "bf16" if args.bf16 else "fp32",
        "modules": "transformer_engine" if args.gpu and not args.local else "local",
        "warm_up": args.warm_up,
        "device": torch.cuda.get_device_name() if args.gpu else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "arms": {},
    }
    for name in args.arms:
        run = Run(name, args.size, args.seed, tokens, size.learning_rate)
        words = flags(run, args.gpu, args.bf16, args.local, args.warm_up)
        record = recorded(run, args.tokens, words, args.gpu)
        curves = {"run": record["losses"]}
        for label, precision in (("plain", "fp32"), ("rounded", "bf16" if args.gpu else "fp64")):
            device = "cuda" if args.gpu else "cpu"
            curves[label] = plain_losses(run, record, precision, device, args.warm_up)
        result["arms"][name] = {key: _rounded(curve) for key, curve in curves.items()}
        largest = max(differences(curves["run"], curves["plain"]))
        print(f"{name}: largest relative difference {largest:.2e}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as (file,):
        file.write_text(json.dumps(result) + "\n")
    print(f"wrote {args.out}")


def comparable() -> list[str]:
    """The arms that the plain optimizer can train: from nothing, and without a bias that moves."""
    return [
        name
        for name, arm in ARMS.items()
        if not arm.after and "--scmoe-expert-bias" not in arm.flags
    ]


def flags(run: Run, on_gpu: bool, in_bf16: bool, local: bool, warm_up: float) -> list[str]:
    """Those of the study, but for what is to be different."""
    words = run.flags(on_cpu=not on_gpu)
    left_out = [] if in_bf16 else ["--bf16"]
    if local:
        words = [word.replace("transformer_engine", "local") for word in words]
        left_out += ["--moe-grouped-gemm", "--moe-permute-fusion"]
        words += UNFUSED.split()
    words = [word for word in words if word not in left_out]
    return [*words, "--lr-warmup-fraction", f"{warm_up:g}"]


def recorded(run: Run, tokens: Path, words: list[str], on_gpu: bool) -> dict:
    """Train an arm with the project's script.

    Args:
        words: the script's flags.

    Returns:
        What record.py has written.

    Raises:
        UsageError: the run failed.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        file = Path(folder) / "record.pt"
        done = subprocess.run(
            command(RECORD, file, tokens, run.arm, words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment(0 if on_gpu else None) | ({} if "--bf16" in words else EXACT),
        )
        if done.returncode:
            last = "\n    ".join(done.stdout.rstrip().split("\n")[-15:])
            raise UsageError(f"{run.name}: exit status {done.returncode}\n    {last}")
        return torch.load(file)


def plain_losses(
    run: Run, record: dict, precision: str, device: str, warm_up: float
) -> list[float]:
    """Train the plain model on what a run has recorded.

    Args:
        precision: ``fp32``, ``fp64``, or ``bf16``: fp32 weights, and products under autocast.

    Returns:
        The training loss of each step in nats a token.
    """
    size, weights = SIZES[run.size], record["weights"]
    rows = len(weights["embedding.word_embeddings.weight"])
    model = ReferenceScMoE(reference_config(run.arm, size, rows))
    load_megatron_state(model, weights)
    model = model.to(device, torch.float64 if precision == "fp64" else torch.float32)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, steps = [], len(record["tokens"])
    for step, (tokens, labels) in enumerate(zip(record["tokens"], record["labels"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, run.learning_rate, warm_up)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = model(tokens.to(device).long(), labels.to(device).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % REPORT_EVERY == 0:
            print(f"{run.arm}, plain {precision}: {step + 1} of {steps}: {loss:.4f}", flush=True)
    return [float(loss) for loss in losses]


def reference_config(arm_name: str, size: Size, vocabulary_rows: int) -> ReferenceConfig:
    """The plain model of an arm, by the arm's flags."""
    arm = ARMS[arm_name]
    gate = "cg1" if "--moe-shared-expert-gate" in arm.flags else "add"
    return ReferenceConfig(
        num_layers=size.blocks,
        hidden_size=size.hidden,
        num_heads=size.heads,
        num_query_groups=size.heads,
        ffn_hidden_size=arm.dense_width(size),
        vocab_size=vocabulary_rows,
        max_sequence_length=size.sequence,
        tap="current" if arm.stock else flag(arm, "--scmoe-tap", "pos2"),
        moe_every=2 if arm.experts else 0,
        router_norm=flag(arm, "--scmoe-router-norm", "own"),
        combine=gate if arm.stock else flag(arm, "--scmoe-combine", "cg1"),
        post_norm="--scmoe-post-norm" in arm.flags,
        num_experts=arm.experts or 1,
        top_k=flag(arm, "--moe-router-topk", 1),
        expert_ffn_hidden_size=arm.expert_width * size.ffn,
        shared_ffn_hidden_size=size.ffn if arm.shared else None,
        pre_softmax="--moe-router-pre-softmax" in arm.flags,
        score_function=flag(arm, "--moe-router-score-function", "softmax"),
        scaling_factor=flag(arm, "--moe-router-topk-scaling-factor", 1.0),
        aux_loss_coeff=0.01,
        tied_embeddings=True,
    )


def learning_rate(step: int, steps: int, peak: float, warm_up_share: float) -> float:
    """Of a step, counted from 0: up from 0 in a share of them, then a cosine down to a tenth."""
    warm_up = warm_up_share * steps
    if step <= warm_up:
        return peak * step / warm_up
    share = (step - warm_up) / (steps - warm_up)
    return peak / 10 + (peak - peak / 10) * (1 + math.cos(math.pi * share)) / 2


def _rounded(losses: list[float]) -> list[float]:
    return [float(f"{loss:.{DIGITS}g}") for loss in losses]


if __name__ == "__main__":
    run_tool(main)
