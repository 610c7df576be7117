"""The exported model in transformers: files, dtypes, generation, outputs, tokenizers.

That it computes what Megatron computes is in distributed/test_checkpoints.py.
"""

import copy
import io
import json
import math
import pickle
from argparse import Namespace

import pytest
import sentencepiece
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.tokenizers import find_tokenizer
from tests.hf import (
    BASE,
    IDS,
    SIGMOID,
    TIED,
    VARIANTS,
    VOCAB,
    all_variants,
    assert_close,
    build,
    logits,
)

pytestmark = pytest.mark.slow

# --- weights: start, dtype, size, files -----------------------------------------------------------


@all_variants
def test_a_fresh_model_has_started_every_tensor(variant):
    config = ScMoEConfig(**(BASE | VARIANTS[variant] | dict(initializer_range=0.02)))
    with torch.device("meta"):
        model = ScMoEForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
        elif tensor.dim() == 1:
            assert (tensor == 0).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.3), name
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(math.log(VOCAB), abs=0.3)


def test_zero_centred_norms_start_at_zero_and_compute_the_same():
    model = build(norm_zero_centered=True)
    fresh = ScMoEForCausalLM(model.config)
    assert not fresh.model.norm.weight.any()
    plain = build()
    state = model.state_dict()
    plain.load_state_dict({k: v + 1 if "norm" in k else v for k, v in state.items()})
    assert_close(logits(model), logits(plain))


def test_the_expert_bias_stays_in_fp32(tmp_path):
    model = build(SIGMOID)
    expected = model.model.layers[1].mlp.router.expert_bias.clone()
    model.save_pretrained(tmp_path)
    assert expected.any()
    for low in (
        copy.deepcopy(model).half(),
        copy.deepcopy(model).to(torch.bfloat16),
        ScMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        ScMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map={"": "cpu"}),
    ):
        router = low.model.layers[1].mlp.router
        assert router.weight.dtype == low.dtype != torch.float32
        assert torch.equal(router.expert_bias, expected)
        output = low(IDS, labels=IDS)
        assert output.logits.dtype == low.dtype
        assert output.loss.item() == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=0.02)
    precise = copy.deepcopy(model).double()
    assert precise(IDS).logits.dtype == torch.float64
    assert_close(logits(precise), logits(model), 1e-4)


@pytest.mark.parametrize("variant", ["pos2, CG-1", TIED])
def test_embeddings_grow_and_shrink(variant):
    model = build(variant)
    expected = logits(model)
    model.resize_token_embeddings(VOCAB + 7)
    assert_close(logits(model)[..., :VOCAB], expected)
    new = IDS.clone()
    new[:, 3] = VOCAB + 6
    output = model(new, labels=new)
    assert output.logits.shape[-1] == model.config.vocab_size == VOCAB + 7
    output.loss.backward()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (variant == TIED)
    model.resize_token_embeddings(50)
    assert_close(logits(model, IDS % 50), logits(build(variant), IDS % 50)[..., :50])


def assert_same(loaded, model) -> None:
    """The same weights. Where a file has them they lie at any address, and some CPUs sum otherwise."""
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert_close(logits(loaded), logits(model))


@all_variants
def test_save_load_copy_and_pickle(variant, tmp_path):
    model = build(variant)
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(ScMoEForCausalLM.from_pretrained(tmp_path), model)
    assert ScMoEConfig.from_pretrained(tmp_path).vocab_size == VOCAB
    # The code lies beside the weights, from whichever class they were saved.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert_same(loaded, model)
    base = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
    assert_close(model.lm_head(hidden), expected)
    assert_close(logits(copy.deepcopy(model)), expected, 0)
    assert_close(logits(pickle.loads(pickle.dumps(model))), expected, 0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_close(logits(torch.load(file, weights_only=False)), expected, 0)


# --- generation and outputs -----------------------------------------------------------------------


@all_variants
def test_every_way_to_generate_agrees(variant):
    model = build(variant, output_router_logits=True)
    prompt = IDS[:, :6]

    def generate(ids=prompt, **options):
        return model.generate(ids, max_new_tokens=6, do_sample=False, **options)

    greedy = generate(use_cache=False)
    assert torch.equal(generate(), greedy)
    assert torch.equal(generate(cache_implementation="static"), greedy)
    assert torch.equal(generate(num_beams=3), generate(num_beams=3, use_cache=False))
    assert torch.equal(generate(prompt[:1], assistant_model=build(variant)), greedy[:1])
    assert torch.equal(generate(prompt[:1], prompt_lookup_num_tokens=2), greedy[:1])
    assert torch.equal(generate(prompt[:1], assistant_early_exit=2), greedy[:1])
    left = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([left, prompt], 1), torch.cat([left, torch.ones_like(prompt)], 1)
    assert torch.equal(generate(padded, attention_mask=mask)[:, 3:], greedy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(cache_implementation="static").shape == greedy.shape


@all_variants
def test_attention_implementations_agree_and_give_what_is_asked_for(variant):
    model = build(variant)
    expected = logits(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("flex_attention")
    assert_close(logits(model), expected)
    model.set_attn_implementation("eager")
    asked = dict(output_attentions=True, output_hidden_states=True, output_router_logits=True)
    with torch.no_grad():
        output = model(IDS, **asked)
        as_tuple = model(IDS, labels=IDS, return_dict=False)
    assert_close(output.logits, expected)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 12, 12)] * 4
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 12, 32)] * 5
    assert_close(model.lm_head(output.hidden_states[-1]), expected)
    assert len(output.router_logits) == sum(model.config.moe_layers)
    assert isinstance(as_tuple, tuple) and as_tuple[1].shape == expected.shape


@all_variants
def test_attention_from_outside_is_used_in_every_block_and_told_what_the_call_was(variant):
    """As vLLM and SGLang put theirs in, registered by name."""
    model, seen = build(variant), []
    expected = logits(model)

    def attend(module, query, key, value, mask, **told):
        seen.append((module.layer_idx, told["batch"]))
        return sdpa_attention_forward(module, query, key, value, mask, **told)

    AttentionInterface.register("from outside", attend)
    AttentionMaskInterface.register("from outside", sdpa_mask)
    model.set_attn_implementation("from outside")
    with torch.no_grad():
        assert_close(model(IDS, batch="of a server").logits, expected)
    assert seen == [(block, "of a server") for block in range(4)]


@all_variants
def test_packed_sequences_do_not_see_each_other(variant):
    model = build(variant)
    first, second = IDS[:1, :5], IDS[1:, :7]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    assert_close(packed[:, :5], logits(model, first))
    assert_close(packed[:, 5:], logits(model, second))


REFUSED = {
    "router_dtype='bfloat16': accepted are": dict(router_dtype="bfloat16"),
    "hidden_act='none': accepted are": dict(hidden_act="none"),
    "num_experts_per_tok=5: accepted are": dict(num_experts_per_tok=5),
    "num_key_value_heads=3: accepted are": dict(num_key_value_heads=3),
    "router_expert_bias=True needs": dict(router_expert_bias=True),
    "router_num_groups=3, router_group_topk=2": dict(router_num_groups=3, router_group_topk=2),
    "router_num_groups=None, router_group_topk=2": dict(router_group_topk=2),
    "rope_parameters.rope_type='dynamic'": dict(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    r"moe_layers=\[1, 0, 1, 0\]": dict(moe_layers=[1, 0, 1, 0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_model_would_ignore_or_stumble_over_is_refused(message):
    with pytest.raises(ValueError, match=message):
        ScMoEConfig(**(BASE | REFUSED[message]))


def test_yarn_scales_cosines_and_sines():
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    cos, sin = build(rope_parameters=yarn).model.rotary_emb(torch.arange(12)[None])
    assert (cos**2 + sin**2).sqrt().mean().item() == pytest.approx(0.1 * math.log(4) + 1, rel=1e-5)


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A model's folder with the tokenizer that an export writes, and SentencePiece's own."""
    folder = tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ran", "a cat, a dog"] * 30),
        model_prefix=str(folder.parent / "sp"),
        vocab_size=VOCAB,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    build().save_pretrained(folder)
    file = folder.parent / "sp.model"
    find_tokenizer(Namespace(), str(file)).save(folder)
    return folder, sentencepiece.SentencePieceProcessor(model_file=str(file))


def no_questions(*_):
    raise AssertionError("transformers asked whether to run custom code")


TEXT = "the cat and a dog"


def test_a_stock_class_loads_the_tokenizer_without_a_question(
    with_tokenizer, tmp_path, monkeypatch, capfd
):
    folder, processor = with_tokenizer
    monkeypatch.setattr("builtins.input", no_questions)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    capfd.readouterr()
    for load in (
        lambda: AutoTokenizer.from_pretrained(tmp_path),
        lambda: PreTrainedTokenizerFast.from_pretrained(folder),
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    ):
        tokenizer = load()
        assert capfd.readouterr() == ("", "")
        assert type(tokenizer).__module__.startswith("transformers.")
        assert tokenizer.encode(TEXT, add_special_tokens=False) == processor.encode(TEXT)
    # The only name of it that transformers 4 knows too.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_autotokenizer_loads_the_tokenizer_whatever_the_answer(with_tokenizer, monkeypatch):
    """transformers 5 asks because of config.json; the tokenizer needs no code."""
    folder, processor = with_tokenizer
    monkeypatch.setattr("builtins.input", lambda question: "n")
    for trust in ({}, {"trust_remote_code": False}):
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        assert tokenizer.encode(TEXT, add_special_tokens=False) == processor.encode(TEXT)


def test_a_copied_tokenizer_leaves_its_own_code_behind(with_tokenizer, tmp_path, monkeypatch):
    """It was loaded by a stock class; trust_remote_code=True, for the model, must not look for it."""
    folder, processor = with_tokenizer
    (tmp_path / "source").mkdir()
    config = (
        (folder / "tokenizer_config.json")
        .read_text()
        .replace("{", '{"auto_map": {"AutoTokenizer": [null, "tokenization_x.XTokenizerFast"]},', 1)
    )
    (tmp_path / "source" / "tokenizer_config.json").write_text(config)
    (tmp_path / "source" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    monkeypatch.setattr("builtins.input", no_questions)
    (tmp_path / "copy").mkdir()
    find_tokenizer(Namespace(), str(tmp_path / "source")).save(tmp_path / "copy")
    for trust in ({}, {"trust_remote_code": True}):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy", **trust)
        assert tokenizer.encode(TEXT, add_special_tokens=False) == processor.encode(TEXT)


def test_the_pipeline_generates_text(with_tokenizer):
    folder, _ = with_tokenizer
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    generate.tokenizer.pad_token_id = 0
    texts = [TEXT, "the dog"]
    outputs = generate(texts, max_new_tokens=4, do_sample=False, batch_size=1)
    for text, (output,) in zip(texts, outputs):
        assert output["generated_text"].startswith(text)
        assert len(output["generated_text"]) > len(text)


def test_configurations_load_by_their_folder(with_tokenizer):
    folder, _ = with_tokenizer
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(math.log(VOCAB), abs=1.5)
