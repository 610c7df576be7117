"""Experts on the host: the same text to the last bit, and models that would not fit."""

import resource
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.inference import generation, offloading
from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.expert_store import Key
from megatron_scmoe.inference.offloading import ExpertOffload, OffloadSettings, offloaded_layers
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.training import load_model
from tests import checkpoints
from tests.harness import run_distributed

PROMPTS = [[5, 9, 2, 7, 1, 1, 3], [4, 8], [6, 6, 6]]
TOKENS = 6
VARIANTS = (
    "pos2",
    "every block",
    "biases, no shared expert, no positions",
)
EXPERTS, LAYERS = 4, 2
"""Of the first variant; each token takes two of the four."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints of models with random weights, saved from two ranks."""
    folder = tmp_path_factory.mktemp("models")
    run_distributed(checkpoints.save_all, 2, str(folder), "EP2", list(VARIANTS))
    return folder


def build(load: Path, settings: OffloadSettings | None = None, dtype=None, at_once=1, **layout):
    """A checkpoint's model, and what has its experts."""
    checkpoint = load_model.Checkpoint(str(load))
    offload = None if settings is None else ExpertOffload(settings)
    model = load_model.build_model(
        checkpoint, load_model.Layout(**layout), dtype, elsewhere=offload
    )
    if offload is not None:
        offload.attach(model, checkpoint.path, at_once)
    return model, offload


def write(model, prompts=PROMPTS, tokens=TOKENS, chunk=None) -> list[generation.Completion]:
    """What is written behind prompts, with all bits of the log-probabilities."""
    sampling = SamplingParams(num_tokens_to_generate=tokens, top_k=1, return_log_probs=True)
    return generation.generate(
        model,
        prompts,
        sampling,
        checkpoints.models.VOCAB,
        micro_batch=len(prompts),
        chunk=chunk,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_experts_write_the_same_bits(models, tmp_path, variant):
    """With room for what three prompts need, and for all; of one layer alone."""
    run_distributed(_same_bits, 1, models / variant, tmp_path)


def _same_bits(load: Path, folder: Path) -> None:
    resident = write(build(load)[0])
    for settings, at_once in (
        (OffloadSettings(folder=folder), len(PROMPTS)),
        (OffloadSettings(folder=folder, cache_gb=1e300), 1),
        (OffloadSettings(folder=folder, layers=1), 1),
    ):
        model, offload = build(load, settings, at_once=at_once)
        assert write(model) == resident, settings
        counts = offload.cache.counts
        misses = counts.uses - counts.hits
        experts = offloaded_layers(model)
        held = sum(own.num_local_experts for _, own in experts)
        assert counts.copied_bytes == misses * experts[0][1].packing.nbytes
        assert misses <= held if settings.cache_gb else misses > held, settings


def test_bf16_too_and_with_room_for_two_experts(models, tmp_path):
    run_distributed(_bf16, 1, models / "pos2", tmp_path)


def _bf16(load: Path, folder: Path) -> None:
    resident = write(build(load, dtype=torch.bfloat16)[0])
    model, _ = build(load, OffloadSettings(folder=folder), dtype=torch.bfloat16)
    assert {p.dtype for _, own in offloaded_layers(model) for p in own.parameters()} == {
        torch.bfloat16
    }
    assert write(model) == resident


@pytest.mark.parametrize("layout", [{"expert": 2}, {"pipeline": 2}], ids=str)
def test_ranks_each_have_their_own(models, tmp_path, layout):
    """They share the files, which the first to come writes."""
    run_distributed(_on_two, 2, models / "pos2", tmp_path, layout)


def _on_two(load: Path, folder: Path, layout: dict) -> None:
    resident = write(build(load, **layout)[0])
    model, offload = build(load, OffloadSettings(folder=folder), **layout)
    assert write(model) == resident
    layers = LAYERS // layout.get("pipeline", 1)
    own = EXPERTS // layout.get("expert", 1)
    assert [o.num_local_experts for _, o in offloaded_layers(model)] == [own] * layers
    assert "offloaded experts: " in offload.report(1)


@dataclass
class Watched:
    """A model with room for two experts, and what happens in it."""

    chosen: list[Key]
    """By the gate, in the order of the layers."""
    copied: list[Key]
    events: list[str]
    """Steps of the routed path, and requests for experts."""
    in_chunks: list[tuple[list[Key], list[Key]]]
    """The first two of each chunk of the same prompt."""


@pytest.fixture(scope="module")
def watched(models, tmp_path_factory) -> Watched:
    """Of one forward over a prompt of 16 tokens."""
    return run_distributed(_watch, 1, models / "pos2", tmp_path_factory.mktemp("files"))[0]


def _watch(load: Path, folder: Path) -> Watched:
    model, offload = build(load, OffloadSettings(folder=folder))
    found = Watched([], [], [], [])
    request, row = offload.cache.request, offload.cache._host.row
    offload.cache.request = lambda keys: found.events.append("request") or request(keys)
    offload.cache._host.row = lambda key: found.copied.append(key) or row(key)
    for layer, own in offloaded_layers(model):
        layer.path.on_action = lambda action: found.events.append(action.step.value)
        layer.path.on_routing = lambda routing, number=own.layer: found.chosen.extend(
            (number, expert) for expert in routing.any(0).nonzero().flatten().tolist()
        )
    write(model, [list(range(16))], 1)
    chosen, copied = list(found.chosen), list(found.copied)
    read = CachedModel.read

    def read_chunk(*args, **how):
        found.chosen.clear(), found.copied.clear()
        logits = read(*args, **how)
        found.in_chunks.append((list(found.chosen), list(found.copied)))
        return logits

    with mock.patch.object(CachedModel, "read", read_chunk):
        write(model, [list(range(16))], 1, chunk=6)
    found.chosen, found.copied = chosen, copied
    return found


def test_the_copies_begin_at_the_gate_and_are_needed_behind_the_window(watched):
    steps = [step.value for step in Step]
    at_the_gate = [*steps[: steps.index("launch dispatch") + 1], "request"]
    first = watched.events[: len(at_the_gate)]
    assert first == at_the_gate
    experts = watched.events.index("experts")
    assert watched.events[len(at_the_gate) : experts] == ["wait dispatch"]


def test_a_prompt_streams_each_expert_once(watched):
    """Though two of them fit: what is copied is what the gate has chosen, in the same order."""
    assert watched.copied == watched.chosen
    assert len(watched.chosen) > 2 * LAYERS


def test_a_prompt_in_chunks_streams_each_expert_once_a_chunk(watched):
    assert len(watched.in_chunks) == 3
    for chosen, copied in watched.in_chunks:
        assert copied == chosen
        assert len(set(chosen)) == len(chosen) > LAYERS


def test_what_cannot_be_offloaded_is_said_in_one_line(models, tmp_path):
    told = run_distributed(_refusals, 2, models / "pos2", tmp_path)[0]
    nbytes = 16384
    expected = (
        f"--expert-cache-gb 1e-05: a layer may need 4 experts at once, of {nbytes} bytes each; "
        "accepted: 0.001 or more, or a smaller --micro-batch",
        "--cpu-moe-layers 3: the model has 2 MoE layers; accepted: 1 to 2",
        "--offload-experts with --tensor-model-parallel-size 2: tensor parallelism splits each expert",
        f"--expert-folder {tmp_path / 'theirs'}: a is in it; accepted: a new or an empty folder",
        f"--expert-folder {tmp_path}/none/a: cannot write there (Not a directory)",
        f"--expert-folder {tmp_path / 'own'}: it holds experts of another checkpoint; accepted:",
        f"--expert-folder {tmp_path / 'own'}: it holds experts in float32; accepted: another folder",
        "--expert-cache-gb 1: 0.000131 GB for experts do not fit the memory; accepted: less",
    )
    for line, words in zip(told, expected, strict=True):
        assert words in line and "\n" not in line


def _refusals(load: Path, folder: Path) -> list[str]:
    theirs, own = folder / "theirs", folder / "own"
    for path in (theirs, folder):
        path.mkdir(exist_ok=True)
    (theirs / "a").touch()
    (folder / "none").touch()
    build(load, OffloadSettings(folder=own))
    told = []
    for settings, arguments, other in (
        (OffloadSettings(cache_gb=1e-5), {"at_once": 5}, load),
        (OffloadSettings(layers=3), {}, load),
        (OffloadSettings(folder=own), {"tensor": 2}, load),
        (OffloadSettings(folder=theirs), {}, load),
        (OffloadSettings(folder=folder / "none" / "a"), {}, load),
        (OffloadSettings(folder=own), {}, load.parent / "every block"),
        (OffloadSettings(folder=own), {"dtype": torch.bfloat16}, load),
    ):
        with pytest.raises(ScMoEError) as refused:
            build(other, settings, **arguments)
        told.append(str(refused.value))
    full = mock.patch.object(offloading, "ExpertCache", side_effect=torch.OutOfMemoryError)
    with full, pytest.raises(ScMoEError) as refused:
        build(load, OffloadSettings(folder=own, cache_gb=1.0))
    return [*told, str(refused.value)]


# More experts than memory.

FEW_MB, EXPERTS_MB = 48, 96
"""What a process may take beyond its imports, and what the experts take."""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    run_distributed(_save_large, 1, folder)
    return folder


def _save_large(folder: Path) -> None:
    checkpoints.models.init_parallel()
    sizes = "--hidden-size 256 --moe-ffn-hidden-size 512 --num-experts 32".split()
    args = checkpoints.arguments("top-1, Llama 3's rope", *sizes)
    assert LAYERS * 32 * 3 * 256 * 512 * 4 == EXPERTS_MB * 2**20
    checkpoints.save(args, folder)


def test_a_model_whose_experts_exceed_the_memory_generates(large, tmp_path):
    (tokens,) = run_distributed(_in_little_memory, 1, large, OffloadSettings(folder=tmp_path))
    (expected,) = run_distributed(_in_memory, 1, large)
    assert tokens == expected


def test_and_does_not_with_its_experts_in_memory(large):
    (told,) = run_distributed(_fails_in_little_memory, 1, large)
    assert "allocate" in told


def _in_memory(load: Path, settings: OffloadSettings | None = None) -> list[list[int]]:
    return [line.tokens for line in write(build(load, settings)[0])]


def _in_little_memory(load: Path, settings: OffloadSettings | None = None) -> list[list[int]]:
    """Under a limit of all memory that a process may write to; files that are mapped are not in it."""
    checkpoints.models.init_parallel()  # its threads have stacks of 8 MB each
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 2**10 + FEW_MB * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return _in_memory(load, settings)


def _fails_in_little_memory(load: Path) -> str:
    try:
        _in_little_memory(load)
    except (RuntimeError, MemoryError) as error:
        return str(error)
    return "nothing"
