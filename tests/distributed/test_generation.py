"""scmoe generate: the text is the exported model's, on every layout, and ends where it should."""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.transformer import utils

from megatron_scmoe.cli.model_flags import MAX_TOKENS
from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.inference import generation
from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.training import load_model
from tests import checkpoints, longcat, text_models
from tests.harness import run_distributed
from tests.text_models import LEARNED, PROMPTS, TAPS_INPUT, VOCAB
from tests.tools import run_tool

TOKENS = 8
WITHOUT_TOKENIZER = "without a tokenizer"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints of models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    text_models.save(folder, text_models.train_tokenizer(folder), TAPS_INPUT, LEARNED)
    run_distributed(_save_without_tokenizer, 1, str(folder))
    return folder


def _save_without_tokenizer(folder: str) -> None:
    checkpoints.models.init_parallel()
    checkpoints.save(checkpoints.arguments(TAPS_INPUT), Path(folder, WITHOUT_TOKENIZER))


def write(load: Path, out: Path, *flags, prompts=PROMPTS) -> list[dict]:
    """The JSON lines of a run; on every rank of a group that is there."""
    words = ["--load", load, "--prompts", *prompts, "--num-tokens-to-generate", TOKENS]
    run_tool("generate", *words, "--output-path", out, *flags)
    torch.distributed.barrier()
    assert {file.suffix for file in out.parent.iterdir()} == {".jsonl"}
    return [json.loads(line) for line in out.read_text().splitlines()]


CHUNKS = [(1, 1), (3, 1), (7, 3)]
"""Tokens of a chunk, and prompts at once; the prompts have 1 to 16 tokens."""


def chunks_of(tokens: int) -> tuple:
    return ("--enable-chunked-prefill", "--inference-dynamic-batching-max-tokens", tokens)


SEEDED = ("--temperature", 0.9, "--seed", 3)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> dict:
    """What one rank writes, by the name of the run; under "shown" what a terminal shows."""
    (texts,) = run_distributed(_alone, 1, models, tmp_path_factory.mktemp("alone"))
    return texts


def _alone(models: Path, out: Path) -> dict:
    load = models / TAPS_INPUT
    log_probs = ["--return-log-probs", "--top-n-logprobs", 2]
    likeliest = ["--top-n-logprobs", VOCAB]
    runs = {
        TAPS_INPUT: ["--micro-batch", 3, *log_probs],
        "seed 3": [*SEEDED, "--micro-batch", 1],
        "seed 4": ["--temperature", 0.9, "--seed", 4],
        "top_k": ["--top_k", 3, *likeliest],
        "top_p": ["--top_p", 0.3, *likeliest],
        "all tokens": ["--temperature", 1.5, *likeliest],
    }
    texts = {name: write(load, out / f"{name}.jsonl", *flags) for name, flags in runs.items()}
    texts[LEARNED] = write(models / LEARNED, out / "learned.jsonl", "--return-log-probs")
    for chunk, at_once in CHUNKS:
        flags = ["--micro-batch", at_once, *chunks_of(chunk), *log_probs]
        texts[f"chunks of {chunk}"] = write(load, out / f"chunks {chunk}.jsonl", *flags)
    word = texts[TAPS_INPUT][2]["generated_text"][3:5]
    texts["stop words"] = write(load, out / "stop.jsonl", "--stop-words", "nowhere", word)
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        words = ("--prompts", PROMPTS[2], "--num-tokens-to-generate", TOKENS)
        run_tool("generate", "--load", load, *words)
    texts["shown"] = stream.getvalue()
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        folder = models / "experts"
        flags = ["--offload-experts", "--expert-folder", folder, "--expert-cache-gb", 0.001]
        flags += ["--expert-cache-policy", "frequency"]
        texts["offloaded"] = write(load, out / "offloaded.jsonl", *runs[TAPS_INPUT], *flags)
    texts["said"] = stream.getvalue()
    return texts


@pytest.fixture(scope="module")
def greedy(alone) -> list[dict]:
    """Three prompts of unequal length at once."""
    return alone[TAPS_INPUT]


@pytest.mark.parametrize("variant", [TAPS_INPUT, LEARNED])
def test_greedy_text_and_its_log_probs_are_those_of_the_exported_model(
    models, alone, tmp_path, variant
):
    from transformers import AutoModelForCausalLM

    lines = alone[variant]
    folder = tmp_path / "exported"
    run_tool("convert", "megatron-to-hf", "--load", models / variant, "--output", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert len({len(line["prompt_tokens"]) for line in lines}) >= 3
    for line in lines:
        prompt = torch.tensor([line["prompt_tokens"]])
        expected = model.generate(
            prompt, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert line["prompt_tokens"] + line["generated_tokens"] == expected[0].tolist()
        with torch.no_grad():
            log_probs = model(expected).logits[0, :-1].log_softmax(-1)
        np.testing.assert_allclose(
            line["prompt_log_probs"] + line["generated_log_probs"],
            log_probs.gather(-1, expected[0, 1:, None]).flatten(),
            atol=2e-5,
        )


def test_an_exported_model_writes_the_same_text_on_two_ranks(models, greedy, tmp_path):
    folder, out, temporary = (tmp_path / name for name in ("exported", "out", "tmp"))
    run_tool("convert", "megatron-to-hf", "--load", models / TAPS_INPUT, "--output", folder)
    out.mkdir()
    temporary.mkdir()
    for lines, refusals in run_distributed(_exported, 2, str(folder), str(out), str(temporary)):
        assert [line["generated_tokens"] for line in lines] == [
            line["generated_tokens"] for line in greedy
        ]
        assert (
            refusals[0]
            == f"--ckpt-step 3: {folder} is a model folder, not iterations; accepted: --load alone"
        )
        assert refusals[1].startswith(str(folder))
        assert "mamba" in refusals[1]
    assert list(temporary.iterdir()) == []


def _exported(folder: str, out: str, temporary: str) -> tuple[list[dict], list[str]]:
    checkpoints.models.init_parallel(2, ep=2)
    rank = torch.distributed.get_rank()
    os.environ |= {"TMPDIR": temporary, "LOCAL_RANK": str(rank)}
    tempfile.tempdir = None  # read TMPDIR anew
    lines = write(
        Path(folder),
        Path(out, "texts.jsonl"),
        "--expert-model-parallel-size",
        2,
        "--return-log-probs",
    )
    refusals = []
    with pytest.raises(ScMoEError) as refusal:
        run_tool("generate", "--load", folder, "--prompts", "A", "--ckpt-step", 3)
    refusals.append(str(refusal.value))
    torch.distributed.barrier()
    if rank == 0:
        config = Path(folder, "config.json")
        config.write_text(config.read_text().replace('"scmoe"', '"mamba"'))
    torch.distributed.barrier()
    with pytest.raises(ScMoEError) as refusal:
        run_tool("generate", "--load", folder, "--prompts", "A")
    return lines, [*refusals, str(refusal.value)]


def test_log_probs_are_those_of_evaluation(models, greedy, tmp_path):
    line = max(greedy, key=lambda line: len(line["prompt_tokens"]))
    ids = np.array([line["prompt_tokens"] + line["generated_tokens"]])
    np.save(tmp_path / "ids.npy", ids)
    logits = tmp_path / "logits.npy"
    words = [
        "--load",
        models / TAPS_INPUT,
        "--tokens",
        tmp_path / "ids.npy",
        "--logits-out",
        logits,
    ]
    run_distributed(run_tool, 1, "evaluate", *map(str, words))
    log_probs = torch.from_numpy(np.load(logits))[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(
        line["prompt_log_probs"] + line["generated_log_probs"],
        log_probs.gather(-1, torch.from_numpy(ids)[0, 1:, None]).flatten(),
        atol=1e-5,
    )


def test_the_likeliest_tokens_begin_with_the_one_that_greedy_takes(greedy):
    for line in greedy:
        for token, log_prob, best in zip(
            line["generated_tokens"],
            line["generated_log_probs"],
            line["generated_top_n_logprobs"],
            strict=True,
        ):
            assert len(best) == 2
            assert (best[0]["id"], best[0]["log_prob"]) == (token, log_prob)
            assert best[1]["log_prob"] <= log_prob


@pytest.mark.parametrize("chunk", [chunk for chunk, _ in CHUNKS])
def test_prompts_in_chunks_have_the_same_texts(alone, greedy, chunk):
    for line, expected in zip(alone[f"chunks of {chunk}"], greedy, strict=True):
        assert line["generated_tokens"] == expected["generated_tokens"]
        for log_probs in ("prompt_log_probs", "generated_log_probs"):
            np.testing.assert_allclose(line[log_probs], expected[log_probs], atol=1e-5)


def test_a_chunk_is_all_that_is_read_at_once(models):
    """Two prompts of 11 and 14 tokens: 11 columns in chunks of 8 tokens, then a token of each."""
    (sizes,) = run_distributed(_sizes, 1, str(models / TAPS_INPUT))
    assert sizes == [8, 8, 6] + [2] * (3 + TOKENS - 1)
    assert MAX_TOKENS == DynamicInferenceContext.DEFAULT_MAX_TOKENS


def _sizes(load: str) -> list[int]:
    model = load_model.build_model(load_model.Checkpoint(load), load_model.Layout())
    sizes, read = [], CachedModel.read

    def watched(self, tokens, *args, **how):
        sizes.append(tokens.numel())
        return read(self, tokens, *args, **how)

    with mock.patch.object(CachedModel, "read", watched):
        generation.generate(
            model,
            [list(range(11)), list(range(14))],
            SamplingParams(num_tokens_to_generate=TOKENS, top_k=1),
            VOCAB,
            micro_batch=2,
            chunk=8,
        )
    return sizes


def test_lines_have_the_order_of_the_prompts(greedy):
    assert [line["prompt"] for line in greedy] == PROMPTS
    assert {line["finish_reason"] for line in greedy} == {"length"}
    assert {len(line["generated_tokens"]) for line in greedy} == {TOKENS}


LAYOUTS = {
    "EP2": ("--expert-model-parallel-size", 2),
    "TP2": ("--tensor-model-parallel-size", 2),
    "PP2": ("--pipeline-model-parallel-size", 2),
    "DP2": (),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_write_the_same(models, alone, greedy, tmp_path, layout):
    """One text ends at once, on one of the ranks: the other needs its experts all the same."""
    end = greedy[1]["generated_tokens"][0]
    results = run_distributed(_on_two, 2, models / TAPS_INPUT, tmp_path, end, LAYOUTS[layout])
    for ended, sampled, in_chunks in results:
        assert ended[1]["finish_reason"] == "stop"
        for line, expected in zip(ended, greedy, strict=True):
            assert line["generated_tokens"] == cut(expected["generated_tokens"], end)
        assert sampled == in_chunks == alone["seed 3"]


def _on_two(load: Path, out: Path, end: int, layout):
    flags = ["--micro-batch", 2, *layout]
    return (
        write(load, out / "ended.jsonl", "--termination-id", end, *flags),
        write(load, out / "sampled.jsonl", *SEEDED, *flags),
        write(load, out / "chunks.jsonl", *SEEDED, *flags, *chunks_of(4)),
    )


def test_no_part_of_a_model_stays_sequence_parallel_though_another_had_its_address(models):
    """What Megatron remembers of a model that is gone is not taken for this one's."""
    assert run_distributed(_with_an_address_used_before, 2, models / TAPS_INPUT) == [True, True]


def _with_an_address_used_before(load: Path) -> bool:
    layout = load_model.Layout(tensor=2)
    model = load_model.build_model(load_model.Checkpoint(str(load)), layout)
    assert model.config.sequence_parallel
    none = {name: [] for name in ("sequence_parallel", "reduce_scatter_embeddings")}
    utils._sequence_parallel_attr_cache = {id(model): none}
    cached = CachedModel(model, 1, 8, Decode(model))
    attributes = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")
    return not any(
        getattr(module, name, False) for module in cached.module.modules() for name in attributes
    )


def cut(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_another_seed_gives_another_text(alone):
    assert alone["seed 3"] != alone["seed 4"]


def test_sampling_is_restricted_to_the_likeliest(alone):
    """Of --top_k by number, of --top_p by probability; without either others are drawn."""

    def drawn(run):
        for line in alone[run]:
            for token, best in zip(line["generated_tokens"], line["generated_top_n_logprobs"]):
                rank = [entry["id"] for entry in best].index(token)
                yield rank, sum(np.exp(entry["log_prob"]) for entry in best[:rank])

    assert {rank for rank, _ in drawn("top_k")} == {0, 1, 2}
    assert max(before for _, before in drawn("top_p")) <= 0.3 + 1e-5
    assert max(rank for rank, _ in drawn("top_p")) > 0
    free = list(drawn("all tokens"))
    assert max(rank for rank, _ in free) > 3 and max(before for _, before in free) > 0.3


def test_a_text_ends_before_a_stop_word(alone, greedy):
    text = greedy[2]["generated_text"]
    word = text[3:5]
    for line, expected in zip(alone["stop words"], greedy, strict=True):
        assert line["generated_text"] == expected["generated_text"].partition(word)[0]
        found = word in expected["generated_text"]
        assert line["finish_reason"] == ("stop" if found else "length")
    assert alone["stop words"][2]["generated_text"] == text[: text.index(word)]


def test_one_prompt_is_shown_with_its_text(alone, greedy):
    assert alone["shown"] == PROMPTS[2] + greedy[2]["generated_text"] + "\n"


def test_offloaded_experts_write_the_same_and_what_they_took_is_said(alone, greedy):
    assert alone["offloaded"] == greedy
    assert re.fullmatch(
        r"offloaded experts: \d+% of \d+ uses found their expert on the device; \S+ MB copied and "
        rf"\S+ ms waited for copies a token \({len(PROMPTS) * TOKENS} written\)\n",
        alone["said"],
    )


def refusal(*flags) -> str:
    with pytest.raises(ScMoEError) as refused:
        run_tool("generate", *flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refusals_before_the_model_is_loaded(models, tmp_path):
    load = ("--load", models / TAPS_INPUT)
    some = (*load, "--prompts", "a")
    for name, content in (("bad", b'{"text": "a"}\n{"txt": 1}\n'), ("none", b"\n")):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    bad, none = tmp_path / "bad.jsonl", tmp_path / "none.jsonl"
    many, offload = "two rails " * 9, ("--offload-experts",)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").touch()
    for flags, told in (
        ((*load, "--prompt-file", bad), f"--prompt-file {bad}:2: accepted is a line as"),
        ((*load, "--prompt-file", none), "there is no prompt in it"),
        ((*load, "--prompt-file", "absent.jsonl"), "--prompt-file absent.jsonl: there is no such"),
        ((*load, "--prompts", "a", ""), "--prompts: prompt 2 is empty; accepted is a token"),
        ((*load, "--prompts", "a", "\udc80"), "--prompts: prompt 2 is not UTF-8"),
        ((*some, "--temperature", 0), "--temperature 0.0: accepted is more than 0; --top_k 1"),
        ((*some, "--top_p", 2), "--top_p 2.0: accepted is 0 to 1"),
        ((*some, "--top_p", 0.5, "--top_k", 2), "--top_k 2 with --top_p 0.5: accepted is one"),
        ((*some, "--top_k", VOCAB + 1), f"--top_k {VOCAB + 1}: the model has {VOCAB} tokens"),
        ((*some, "--termination-id", VOCAB), f"accepted are ids from 0 to {VOCAB - 1}, or -1"),
        ((*some, "--stop-words", ""), "accepted are words of one character or more"),
        ((*some, "--output-path", bad), f"--output-path: {bad} exists; give another"),
        ((*some, "--output-path", tmp_path / "a" / "b.jsonl"), f"cannot write in {tmp_path}/a;"),
        ((*some, "--num-tokens-to-generate", 0), "--num-tokens-to-generate 0: accepted is 1"),
        (
            (*some, "--num-tokens-to-generate", 60),
            "with --num-tokens-to-generate 60 that is more than the model's "
            "--max-position-embeddings 48; accepted: --num-tokens-to-generate 4",
        ),
        ((*load, "--prompts", many), "accepted: prompts of 47 tokens or less"),
        ((*some, "--tokenizer-model", "no.model"), "--tokenizer-model no.model"),
        (
            (*some, "--inference-dynamic-batching-max-tokens", 64),
            "--inference-dynamic-batching-max-tokens 64: accepted with --enable-chunked-prefill",
        ),
        ((*some, *chunks_of(0)), "--inference-dynamic-batching-max-tokens 0: a step reads a token"),
        (
            (*load, "--prompts", *"abc", *chunks_of(2)),
            "max-tokens 2: a step reads a token of each of 3 texts at once; accepted is 3 or more, "
            "or a smaller --micro-batch",
        ),
        ((*some, "--expert-cache-gb", 1), "--expert-cache-gb 1.0: accepted with --offload-experts"),
        ((*some, *offload, "--cpu-moe-layers", 0), "--cpu-moe-layers 0: accepted is more than 0"),
        ((*some, *offload), "experts are mapped from files; accepted with --expert-folder DIR"),
        (
            ("--load", exported, "--prompts", "a", *offload, "--expert-folder", tmp_path),
            f"--offload-experts with --load {exported}: a model folder is converted anew each time",
        ),
    ):
        assert told in refusal(*flags), flags


def test_without_a_tokenizer_there_is_no_text(models):
    told = refusal("--load", models / WITHOUT_TOKENIZER, "--prompts", "a")
    assert told.startswith(
        "--prompts: the checkpoint's tokenizer is NullTokenizer, which reads ids"
    )
    assert told.endswith("accepted: --tokenizer-model MODEL")


def test_longcat_flash_writes_what_transformers_own_model_writes(tmp_path):
    """Latent attention has a cache of its own kind; on two tensor-parallel ranks."""
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7]]
    model = longcat.build("zero experts", tmp_path / "hf")
    longcat.import_folder(tmp_path / "hf", tmp_path / "megatron")
    for found in run_distributed(_longcat, 2, str(tmp_path / "megatron"), prompts):
        for prompt, tokens in zip(prompts, found, strict=True):
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
            )
            assert prompt + tokens == expected[0].tolist()


def _longcat(load: str, prompts: list[list[int]]) -> list[list[int]]:
    checkpoint = load_model.Checkpoint(load)
    model = load_model.build_model(checkpoint, load_model.Layout(tensor=2))
    sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1)
    completions = generation.generate(model, prompts, sampling, longcat.models.VOCAB, micro_batch=3)
    return [completion.tokens for completion in completions]
