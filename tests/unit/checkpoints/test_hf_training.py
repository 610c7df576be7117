"""Training the exported model: low precision, recomputation, data parallelism, auxiliary loss."""

import copy
import math

import peft
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import (
    ScMoEForCausalLM,
    ScMoERouter,
    load_balancing_loss,
)
from tests.hf import BASE, IDS, SIGMOID, TIED, VOCAB, all_variants, assert_close, build, logits

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("adapted", [False, True])
def test_smoothed_labels_are_those_of_the_next_token(adapted, tmp_path):
    """Trainer shifts them for models whose names it knows, and compares each token with itself else."""
    model = build()
    expected = torch.nn.functional.cross_entropy(
        logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), label_smoothing=0.1
    )
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    arguments = TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS})
    assert_close(loss, expected)


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
