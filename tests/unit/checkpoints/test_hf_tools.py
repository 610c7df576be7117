"""The exported model under tools that wrap, replace, move or trace modules."""

import copy
from contextlib import contextmanager

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM, ScMoERouter
from tests.hf import IDS, SIGMOID, TIED, all_variants, assert_close, build, logits

pytestmark = pytest.mark.slow

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


# --- devices and graphs ---------------------------------------------------------------------------


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
