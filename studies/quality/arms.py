"""The models that the study compares, as flags; of one size all have as many active parameters.

Blocks come in pairs, one with a dense MLP of width F = 3 h and one with experts. In a pair a token
passes 3 F of MLP: the dense F, and 2 F of experts. So the experts are: two of eight (top-2), one of
four of width 2 F (top-1), or the shared one and one of eight. The dense model has 1.5 F in every block.
"""

from dataclasses import dataclass

WARM_UP = 0.05
"""Share of the steps in which the learning rate comes to its peak."""

UNFUSED = "--no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm"
"""What Megatron's own modules need where there is no Apex."""

PAIRED = "--moe-layer-freq [0,1]*{pairs}"
_ROUTED = (
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type alltoall"
)
_SHARED = (
    "--moe-router-topk 1 --moe-router-pre-softmax --moe-shared-expert-intermediate-size {expert}"
)


@dataclass(frozen=True)
class Size:
    """A size: depth and width, how it is trained, and for how many tokens unless told otherwise."""

    blocks: int
    hidden: int
    heads: int
    learning_rate: float
    tokens: int
    batch: int = 32
    """Sequences a step, and a micro-batch."""
    sequence: int = 512
    vocabulary: int = 8192

    @property
    def ffn(self) -> int:
        """F, the width of a dense MLP beside experts, and of an expert."""
        return 3 * self.hidden

    @property
    def pairs(self) -> int:
        """Half the blocks."""
        return self.blocks // 2


SIZES = {
    "10m": Size(8, 256, 4, learning_rate=2e-3, tokens=100_000_000),
    "30m": Size(12, 384, 6, learning_rate=7e-4, tokens=100_000_000),
    "90m": Size(12, 640, 10, learning_rate=5e-4, tokens=100_000_000),
    "tiny": Size(2, 64, 2, 2e-3, tokens=20_000, batch=4, sequence=64),
}
"""By active parameters, embeddings left out; ``tiny`` tries the programs out."""


@dataclass(frozen=True)
class Arm:
    """One model.

    Args:
        question: what it is there for.
        flags: with the fields ``pairs`` and ``expert`` (the width F) to fill in.
        experts: routed ones.
        chosen: how many of them a token passes, on average.
        expert_width: of an expert, in F.
        shared: whether there is a shared expert.
        stock: whether it is Megatron's own model.
        dense_share: width of a dense MLP, in F.
        after: the arm whose trained weights it starts from; without, it starts from nothing.
        conversion: flags of ``tools/convert.py upcycle`` that make it of those.
    """

    question: str
    flags: str = ""
    experts: int = 8
    chosen: int = 1
    expert_width: int = 1
    shared: bool = True
    stock: bool = False
    dense_share: float = 1.0
    after: str = ""
    conversion: str = ""

    def dense_width(self, size: Size) -> int:
        """Width of a dense MLP."""
        return int(size.ffn * self.dense_share)


def _scmoe(question: str, flags: str, **other) -> Arm:
    return Arm(question, f"{_SHARED} {flags}", **other)


_DENSE = {"experts": 0, "chosen": 0, "shared": False, "stock": True}

ARMS = {
    "dense": Arm("what experts give", **_DENSE, dense_share=1.5),
    "top1": Arm(
        "one wide expert",
        "--moe-router-topk 1 --moe-router-pre-softmax",
        experts=4,
        expert_width=2,
        shared=False,
        stock=True,
    ),
    "top2": Arm(
        "the usual MoE; weights of the two chosen add up to 1",
        "--moe-router-topk 2",
        chosen=2,
        shared=False,
        stock=True,
    ),
    "top2-presoftmax": Arm(
        "top-2 with the weights that the others have",
        "--moe-router-topk 2 --moe-router-pre-softmax",
        chosen=2,
        shared=False,
        stock=True,
    ),
    "shared": Arm("a shared expert, no shortcut (Pos-0)", _SHARED, stock=True),
    "shared-gate": Arm(
        "the same, with CG-1's gate", f"{_SHARED} --moe-shared-expert-gate", stock=True
    ),
    "pos1": _scmoe("Pos-1, CG-1", "--scmoe-tap pos1"),
    "pos2": _scmoe("Pos-2, CG-1: the paper's choice", "--scmoe-tap pos2"),
    "pos3": _scmoe("Pos-3, CG-1", "--scmoe-tap pos3"),
    "pos2-add": _scmoe("Pos-2, direct add", "--scmoe-tap pos2 --scmoe-combine add"),
    "pos2-cg2": _scmoe("Pos-2, CG-2", "--scmoe-tap pos2 --scmoe-combine cg2"),
    "pos2-shared-norm": _scmoe(
        "the router's norm is the dense MLP's", "--scmoe-tap pos2 --scmoe-router-norm shared"
    ),
    "pos2-post-norm": _scmoe("a norm on the sum", "--scmoe-tap pos2 --scmoe-post-norm"),
    "pos2-zero": _scmoe(
        "two of eight experts and eight zero experts, balanced by a bias",
        "--scmoe-tap pos2 --scmoe-zero-experts 8 --scmoe-expert-bias proportional "
        "--moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
        "--moe-router-bias-update-rate 1e-2",
    ),
    "pos2-doubled": _scmoe(
        "the routed output times two: is its weight too small?",
        "--scmoe-tap pos2 --moe-router-topk-scaling-factor 2",
    ),
    "pos2-fourfold": _scmoe(
        "the same times four", "--scmoe-tap pos2 --moe-router-topk-scaling-factor 4"
    ),
    "pos2-sigmoid": _scmoe(
        "a score of its own for each expert, 0.5 at the begin",
        "--scmoe-tap pos2 --moe-router-score-function sigmoid",
    ),
    "pos2-7": _scmoe(
        "seven routed experts: as many parameters in all as top-2", "--scmoe-tap pos2", experts=7
    ),
}
"""The arms that start from nothing. Later flags of an arm win over earlier ones."""

ARMS |= {
    "narrow": Arm("a dense model to convert, its MLPs as wide as an expert", **_DENSE),
    "narrow-continued": Arm("it goes on as it is", **_DENSE, after="narrow"),
    "from-dense": _scmoe(
        "it goes on as pos2",
        "--scmoe-tap pos2",
        after="narrow",
        conversion="--num-experts 8 --topk 1 --init drop",
    ),
    "top2-continued": Arm(
        "top-2 goes on as it is",
        "--moe-router-topk 2",
        chosen=2,
        shared=False,
        stock=True,
        after="top2",
    ),
    "from-top2": Arm(
        "top-2 goes on with its experts behind a tap; it has no shared expert",
        "--moe-router-topk 2 --scmoe-tap pos2 --scmoe-combine add",
        chosen=2,
        shared=False,
        after="top2",
        conversion="--tap pos2",
    ),
}
"""And two models with what becomes of them: continued, and converted into ScMoE."""

CONTINUED = {"from-dense": "narrow-continued", "from-top2": "top2-continued"}
"""What a converted model is compared with: both see the same tokens."""


def model_flags(arm: Arm, size: Size, on_cpu: bool) -> list[str]:
    """The words that say what the model is."""
    words = (
        f"--num-layers {size.blocks} --hidden-size {size.hidden} "
        f"--num-attention-heads {size.heads} --ffn-hidden-size {arm.dense_width(size)} "
        f"--seq-length {size.sequence} --max-position-embeddings {size.sequence} "
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 "
        f"--tokenizer-type NullTokenizer --vocab-size {size.vocabulary} "
    )
    if arm.experts:
        expert = size.ffn * arm.expert_width
        words += (
            f"--num-experts {arm.experts} --moe-ffn-hidden-size {expert} {PAIRED} {_ROUTED} "
            f"{arm.flags}"
        ).format(pairs=size.pairs, expert=expert)
    return (words + " " + _kernels(arm, on_cpu)).split()


def training_flags(size: Size, seed: int, tokens: int, learning_rate: float) -> list[str]:
    """The words that say how it is trained: the same for all arms, data order included."""
    words = (
        f"--micro-batch-size {size.batch} --global-batch-size {size.batch} "
        f"--train-iters {iterations(size, tokens)} --seed {seed} "
        f"--lr {learning_rate:g} --min-lr {learning_rate / 10:g} --lr-decay-style cosine "
        f"--lr-warmup-fraction {WARM_UP:g} --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 "
        "--weight-decay 0.1 --clip-grad 1.0 --split 1,0,0 --eval-iters 0 --eval-interval 1000000 "
        "--log-interval 50 --num-workers 1 --manual-gc --manual-gc-interval 200 "
        "--no-check-for-nan-in-loss-and-grad"
    )
    return words.split()


def iterations(size: Size, tokens: int) -> int:
    """Steps that take at least so many tokens."""
    return -(-tokens // (size.batch * size.sequence))


def flag(arm: Arm, name: str, default):
    """The value of a flag of an arm, of the default's type."""
    words = arm.flags.split()
    return type(default)(words[words.index(name) + 1]) if name in words else default


def active_parameters(arm: Arm, size: Size) -> int:
    """Parameters that a token passes, embedding and output layer (tied) left out.

    Zero experts have none; norms and gates are counted.
    """
    return _parameters(arm, size, arm.chosen)


def total_parameters(arm: Arm, size: Size) -> int:
    """All parameters, embedding left out."""
    return _parameters(arm, size, arm.experts)


def _parameters(arm: Arm, size: Size, experts: int) -> int:
    h, mlp = size.hidden, 3 * size.hidden * size.ffn
    common = size.blocks * (4 * h * h + 2 * h) + h  # attentions, norms, the last norm
    if not arm.experts:
        return common + int(size.blocks * mlp * arm.dense_share)
    pair = mlp + mlp * arm.expert_width * (experts + arm.shared)
    pair += h * (arm.experts + flag(arm, "--scmoe-zero-experts", 0))  # router
    if not arm.stock:
        combine = flag(arm, "--scmoe-combine", "cg1")
        pair += {"add": 0, "cg1": h, "cg2": 2 * h}[combine]
        pair += h * ("--scmoe-router-norm shared" not in arm.flags)
        pair += h * ("--scmoe-post-norm" in arm.flags)
        pair -= h * (not arm.shared)  # nothing reads the norm behind the second attention
    pair += h * ("--moe-shared-expert-gate" in arm.flags)
    return common + size.pairs * pair


def _kernels(arm: Arm, on_cpu: bool) -> str:
    if on_cpu:
        return (
            "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion "
            f"{UNFUSED}"
        )
    experts = "--moe-grouped-gemm --moe-permute-fusion" if arm.experts else ""
    return (
        "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion "
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native "
        f"--no-create-attention-mask-in-dataloader {experts}"
    )
