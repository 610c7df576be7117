"""The exported model (checkpoints/hf) under the tools of transformers' ecosystem.

Small random models; that they compute what Megatron computes is in distributed/test_checkpoints.py.
"""

import copy
import io
import json
import math
import pickle
from argparse import Namespace
from contextlib import contextmanager

import accelerate
import peft
import pytest
import sentencepiece
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import (
    ScMoEForCausalLM,
    ScMoERouter,
    load_balancing_loss,
)
from megatron_scmoe.checkpoints.tokenizers import find_tokenizer

VOCAB = 64
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=40,
    shared_expert_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VARIANTS = {
    "pos2, CG-1": {},
    "pos3, shared norm, CG-2": dict(
        tap="pos3", router_norm="shared", combine="cg2", post_norm=True
    ),
    "GPT-2 with biases, tied": dict(
        norm_type="LayerNorm",
        position_embedding="learned_absolute",
        gated_mlp=False,
        hidden_act="gelu",
        linear_bias=True,
        tie_word_embeddings=True,
    ),
    "sigmoid in fp32, expert bias, groups, QK norm": dict(
        router_score_function="sigmoid",
        router_expert_bias=True,
        router_dtype="float32",
        num_experts=8,
        router_num_groups=4,
        router_group_topk=2,
        router_scaling_factor=2.5,
        qk_norm=True,
    ),
    "every block, no shared expert": dict(
        tap="pos1", moe_layers=[1] * 4, combine="add", shared_expert_intermediate_size=None
    ),
}
TIED = "GPT-2 with biases, tied"
SIGMOID = "sigmoid in fp32, expert bias, groups, QK norm"
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))

all_variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "pos2, CG-1", **changes) -> ScMoEForCausalLM:
    """A model with random weights, the same each time; norms and biases differ from their start."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = ScMoEForCausalLM(ScMoEConfig(**(BASE | VARIANTS[variant] | changes)))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(actual, expected, tolerance=1e-5) -> None:
    assert (actual.float() - expected.float()).abs().max() <= tolerance


# --- every weight in its own module ---------------------------------------------------------------


class UsedAtHome(TorchFunctionMode):
    """While active, a weight may be computed with only inside the forward of a module that owns it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[nn.Module]] = {}
        self.names = {}
        self.used = set()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args: self.running.append(module))
            module.register_forward_hook(lambda *_: self.running.pop() and None)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for part, tensor in own:
                self.owners.setdefault(id(tensor), []).append(module)
                self.names[id(tensor)] = f"{name}.{part}"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for tensor in (*args, *(kwargs or {}).values()):
            if id(tensor) in self.owners:
                home = any(self.running[-1] is owner for owner in self.owners[id(tensor)])
                assert home, f"{self.names[id(tensor)]} is used in {type(self.running[-1])}"
                self.used.add(id(tensor))
        return func(*args, **(kwargs or {}))


@all_variants
@pytest.mark.parametrize("training", [False, True])
def test_every_weight_is_used_in_the_forward_of_its_own_module(variant, training):
    model = build(variant).train(training)
    with UsedAtHome(model) as watch:
        model(IDS, labels=IDS, output_router_logits=True)
    assert {watch.names[key] for key in watch.owners.keys() - watch.used} == set()


@all_variants
def test_lora_on_every_linear_layer_learns_and_merges(variant):
    model = build(variant)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    adapted(IDS, labels=IDS).loss.backward()
    adapters = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(adapters) == 2 * (len(linear) - 1)  # all but the head
    assert all(gradient is not None for gradient in adapters.values())
    if variant != SIGMOID:  # whose eight experts do not all get tokens
        assert all(gradient.any() for gradient in adapters.values())
    unmerged = logits(adapted.eval())
    assert (unmerged - logits(model)).abs().max() > 0.1
    assert_close(logits(adapted.merge_and_unload()), unmerged, 1e-4)


@all_variants
def test_the_router_is_adapted_by_name(variant):
    model = build(variant)
    low_rank = peft.LoraConfig(
        target_modules=["down_proj"],
        target_parameters=["router.weight"],
        r=4,
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), low_rank)
    unmerged = logits(adapted.eval())
    assert_close(logits(adapted.merge_and_unload()), unmerged, 1e-4)
    whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["router"])
    adapted = peft.get_peft_model(copy.deepcopy(model), whole)
    assert_close(logits(adapted.eval()), logits(model))
    adapted.train()(IDS, labels=IDS).loss.backward()
    routers = [p.grad for n, p in adapted.named_parameters() if "router.modules_to_save" in n]
    assert routers and all(gradient.any() for gradient in routers)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules="all-linear", r=4, use_dora=True, init_lora_weights=False),
        peft.IA3Config(
            target_modules=["v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        peft.LoKrConfig(target_modules=["o_proj", "down_proj"], init_weights=False),
        peft.VeraConfig(target_modules=["o_proj"]),
    ],
    ids=lambda config: type(config).__name__ + ("-DoRA" if getattr(config, "use_dora", 0) else ""),
)
def test_other_adapters_merge_too(config):
    adapted = peft.get_peft_model(build(TIED), config).eval()
    assert_close(logits(adapted), logits(adapted.merge_and_unload()), 1e-4)


def test_quantised_linear_layers_take_the_place_of_all_and_the_router_stays():
    model = build()
    quantised = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
    )
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    routers = [module for module in quantised.modules() if isinstance(module, ScMoERouter)]
    assert [router.weight.dtype for router in routers] == [torch.float32] * 2
    error = (logits(quantised) - logits(model)).abs().median()
    assert error < 0.1 * logits(model).std()


# --- devices --------------------------------------------------------------------------------------


@all_variants
def test_offloading_gives_the_same_logits(variant, tmp_path):
    model = build(variant)
    expected = logits(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert_close(logits(offloaded), expected, 0)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.model.named_children()} | {"layers": None}
    device_map = {f"model.{name}": place for name, place in places.items() if place}
    device_map |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(4)}
    loaded = ScMoEForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map | {"lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert loaded.model.layers[3].mlp.experts[0].down_proj.weight.is_meta
    assert_close(logits(loaded), expected, 0)


def test_blocks_are_not_split_over_devices():
    model = build()
    size = sum(p.nbytes for p in model.model.layers[:2].parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={0: 2 * size, 1: 2 * size, "cpu": 2**30},
        no_split_module_classes=model._no_split_modules,
    )
    assert len(set(device_map.values())) > 1
    assert not any(".mlp" in name or ".self_attn" in name for name in device_map)


@contextmanager
def dynamo(monkeypatch):
    """torch.compile, which the mapping of CUDA to the CPU turns off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


def test_compiled_it_gives_the_same_logits_and_gradients(monkeypatch):
    model = build("pos3, shared norm, CG-2", num_hidden_layers=2, num_experts=2)
    reference = copy.deepcopy(model)
    with dynamo(monkeypatch):
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="eager")
        output = compiled(IDS, labels=IDS)
        output.loss.backward()
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert_close(output.logits, logits(reference))
    reference(IDS, labels=IDS).loss.backward()
    for actual, expected in zip(model.parameters(), reference.parameters()):
        assert_close(actual.grad, expected.grad)


def test_torch_export_takes_the_whole_graph(monkeypatch):
    model = build(SIGMOID, num_hidden_layers=2)
    with dynamo(monkeypatch):
        program = torch.export.export(model, (IDS,), dict(use_cache=False), strict=False)
    others = IDS.flip(1)
    assert_close(program.module()(others, use_cache=False).logits, logits(model, others))


# --- training -------------------------------------------------------------------------------------


@all_variants
def test_bf16_autocast_trains_and_the_router_keeps_its_dtype(variant):
    model = build(variant).train()
    seen = []
    for module in model.modules():
        if isinstance(module, ScMoERouter):
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out[0])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for router, tokens, scores in seen[: sum(model.config.moe_layers)]:
        if model.config.router_dtype is None:
            assert scores.dtype == torch.bfloat16
        else:
            assert torch.equal(scores, tokens.float() @ router.weight.T)


@pytest.mark.parametrize("variant", ["pos3, shared norm, CG-2", SIGMOID])
def test_recomputation_gives_the_same_gradients(variant):
    def gradients(**checkpointing):
        model = build(variant, router_aux_loss_coef=1.0).train()
        if checkpointing:
            model.activation_checkpointing_enable(checkpointing)
        model(IDS, labels=IDS, output_router_logits=True).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    for reentrant in (True, False):
        for name, actual in gradients(use_reentrant=reentrant).items():
            assert_close(actual, expected[name])


class Repeated(torch.utils.data.Dataset):
    """Eight texts, again and again."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index % 8)
        ids = torch.randint(3, VOCAB, (16,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("variant", [TIED, SIGMOID])
def test_trainer_in_bf16_lowers_the_loss(variant, tmp_path):
    model = build(variant, initializer_range=0.05, output_router_logits=True)
    arguments = TrainingArguments(
        tmp_path,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Repeated(), eval_dataset=Repeated())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert losses[-1] < losses[0] - 0.5
    assert trainer.evaluate()["eval_loss"] < losses[0] - 0.5
    saved = ScMoEForCausalLM.from_pretrained(tmp_path / "checkpoint-12").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_experts_without_tokens_get_zero_gradients_as_data_parallelism_needs():
    few = IDS[:1, :2]
    model = build(num_experts=8, router_norm="shared").train()
    expected = copy.deepcopy(model)
    expected(few, labels=few).loss.backward()
    idle = [p for p in expected.model.layers[1].mlp.experts.parameters() if not p.grad.any()]
    assert len(idle) >= 4 * 3  # two tokens, at most four experts
    replicas = DistributedDataParallel(copy.deepcopy(model))
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for wrapped in (replicas, sharded):
        for _ in range(2):  # a gradient that is missing is noticed in the next iteration
            wrapped.zero_grad()
            wrapped(few, labels=few).loss.backward()
        for actual, p in zip(wrapped.parameters(), expected.parameters()):
            assert_close(getattr(actual.grad, "full_tensor", lambda g=actual.grad: g)(), p.grad)


# --- the auxiliary loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pos2, CG-1", SIGMOID])
def test_the_auxiliary_loss_is_megatrons(variant):
    model = build(variant)
    config = model.config
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert [tuple(scores.shape) for scores in output.router_logits] == [
        (24, config.num_experts)
    ] * 2
    expected = 0
    for scores in output.router_logits:
        chosen, probs = compute_routing_scores_for_aux_loss(
            scores, config.num_experts_per_tok, config.router_score_function
        )
        expected += switch_load_balancing_loss_func(
            probs, chosen.sum(0), 24, config.num_experts_per_tok, config.num_experts, 1.0
        )
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = model(IDS, labels=IDS)
    assert plain.aux_loss is None and plain.router_logits is None
    added = config.router_aux_loss_coef * expected.item()
    assert output.loss.item() == pytest.approx(plain.loss.item() + added, rel=1e-5)


def test_padding_does_not_count_in_the_auxiliary_loss():
    model = build()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, 17)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = dict(output_router_logits=True)
    actual = model(padded, attention_mask=mask, position_ids=positions, **options).aux_loss
    assert actual.item() == pytest.approx(model(IDS, **options).aux_loss.item(), rel=1e-5)
    balanced = torch.eye(4).repeat(3, 1) * 100
    config = ScMoEConfig(**(BASE | dict(num_experts_per_tok=1)))
    assert load_balancing_loss((balanced, balanced), config).item() == pytest.approx(2)


def test_accumulated_steps_have_the_auxiliary_loss_once():
    model = build(output_router_logits=True, router_aux_loss_coef=1.0)
    items = 2 * IDS[:, 1:].numel()  # in two equal micro-batches
    once = model(IDS, labels=IDS).loss.item()
    part = model(IDS, labels=IDS, num_items_in_batch=items).loss.item()
    assert 2 * part == pytest.approx(once, rel=1e-5)


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


@all_variants
def test_save_load_copy_and_pickle(variant, tmp_path):
    model = build(variant)
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_close(logits(ScMoEForCausalLM.from_pretrained(tmp_path)), expected, 0)
    assert ScMoEConfig.from_pretrained(tmp_path).vocab_size == VOCAB
    # The code lies beside the weights, from whichever class they were saved.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert_close(logits(loaded), expected, 0)
    base = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
    assert_close(model.lm_head(hidden), expected, 0)
    assert_close(logits(copy.deepcopy(model)), expected, 0)
    assert_close(logits(pickle.loads(pickle.dumps(model))), expected, 0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_close(logits(torch.load(file, weights_only=False)), expected, 0)


def test_a_merged_adapter_is_saved_as_a_model(tmp_path):
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    config = peft.LoraConfig(
        target_modules="all-linear", r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, config).eval()
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", trust_remote_code=True
    ).eval()
    assert_close(logits(again), expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert_close(logits(merged), expected, 1e-4)


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
