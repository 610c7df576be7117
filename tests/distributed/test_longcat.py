"""LongCat-Flash: the model of transformers' own class on Megatron, and how it trains there."""

import hashlib

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from transformers import LongcatFlashForCausalLM

from megatron_scmoe.checkpoints.formats.longcat_flash import to_longcat
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors, write_safetensors
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.vocabulary import set_rows
from megatron_scmoe.model.router import ScMoERouter, bias_step, finalize_model_grads
from tests import longcat, models
from tests.harness import run_distributed

EP2 = models.LAYOUTS["EP2"]
ALL = list(longcat.VARIANTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each variant: transformers' folder, the imported checkpoint and transformers' logits."""
    made = {}
    for number, variant in enumerate(ALL):
        folder = tmp_path_factory.mktemp("longcat") / str(number)
        model = longcat.build(variant, folder)
        checkpoint = longcat.import_folder(folder, folder.parent / "megatron")
        with torch.no_grad():
            logits = model(models.batch(0)[0]).logits.numpy()
        made[variant] = (folder, checkpoint, logits)
    return made


@pytest.fixture(scope="module", params=["1 rank", "EP2", "EP2, chunks", "EP2, all-gather"])
def imported(request, folders):
    """The logits of every variant on each rank of a layout."""
    layout = models.LAYOUTS[request.param.partition(",")[0]]
    changes, scmoe = {}, {}
    if "chunks" in request.param:
        scmoe = dict(chunks=2)
    if "all-gather" in request.param:
        changes, scmoe = dict(moe_token_dispatcher_type="allgather"), dict(overlap=False)
    inputs = {v: (str(f), str(c)) for v, (f, c, _) in folders.items()}
    return run_distributed(_logits, layout["world_size"], inputs, layout, scmoe, changes)


@pytest.mark.parametrize("variant", ALL)
def test_logits_are_those_of_transformers(folders, imported, variant):
    expected = folders[variant][2]
    assert np.abs(expected).max() > 1  # so that the next line says something
    for logits in imported:
        # fp32; sums run in another order.
        assert np.abs(logits[variant] - expected).max() < 1e-4


def _logits(folders: dict, layout: dict, scmoe: dict, changes: dict) -> dict[str, np.ndarray]:
    found = {}
    for variant, (folder, checkpoint) in folders.items():
        model = longcat.build_megatron(longcat.load_config(folder), layout, scmoe, **changes)
        longcat.load(model, checkpoint)
        with torch.no_grad():
            found[variant] = models.forward(model.eval(), models.batch(0)[0]).numpy()
    return found


@pytest.mark.parametrize("variant", ["zero experts", "queries not compressed"])
def test_gradients_are_those_of_transformers(variant, tmp_path):
    theirs = longcat.build(variant, tmp_path / "longcat")
    checkpoint = longcat.import_folder(tmp_path / "longcat", tmp_path / "megatron")
    config = longcat.load_config(tmp_path / "longcat")
    ours = longcat.build_megatron(config)
    longcat.load(ours, checkpoint)
    tokens, labels = models.batch(0)
    _, gradients = models.loss_and_gradients(ours, tokens, labels)
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.view(-1, models.VOCAB), labels.view(-1)).backward()
    actual = to_longcat(config, longcat.by_checkpoint_key(gradients))
    expected = longcat.on_disk(
        {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    )
    if variant == "queries not compressed":
        expected = {name.replace("q_b_proj", "q_proj"): g for name, g in expected.items()}
    biases = {name for name in actual if name.endswith("e_score_correction_bias")}
    assert actual.keys() - biases == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name].load() - gradient).abs().max()
        assert difference <= 2e-5 * gradient.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("variant", ALL)
def test_the_way_back_is_exact(folders, variant, tmp_path):
    folder, checkpoint, logits = folders[variant]
    config = longcat.load_config(folder)
    tensors = set_rows(read_megatron(checkpoint).tensors, config["vocab_size"])
    write_safetensors(tmp_path, to_longcat(config, tensors))
    before, after = read_safetensors(folder), read_safetensors(tmp_path)
    assert before.keys() == after.keys()
    unused = {
        f"experts.{i}."
        for i in range(
            config["n_routed_experts"], config["n_routed_experts"] + config["zero_expert_num"]
        )
    }
    for name, tensor in before.items():
        if not any(part in name for part in unused):
            assert torch.equal(after[name].load(), tensor.load()), name
    if config["q_lora_rank"] is None:
        return  # transformers' class has no such model
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = LongcatFlashForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert np.array_equal(model(models.batch(0)[0]).logits.numpy(), logits)


@pytest.mark.parametrize("chunks", [1, 2])
def test_overlap_on_and_off_give_the_same_bits(folders, chunks):
    folder, checkpoint, _ = folders["zero experts"]
    for rank in run_distributed(_train_both_ways, 2, str(folder), str(checkpoint), chunks):
        assert rank[True] == rank[False]
        assert len(set(rank[True])) == len(rank[True]), "training must change the gradients"


def _train_both_ways(folder: str, checkpoint: str, chunks: int) -> dict[bool, list[str]]:
    return {
        overlap: _digests(folder, checkpoint, dict(overlap=overlap, chunks=chunks))
        for overlap in (True, False)
    }


def _digests(folder: str, checkpoint: str, scmoe: dict, steps: int = 8) -> list[str]:
    """A digest of loss, gradients and biases for each step of gradient descent."""
    config = longcat.load_config(folder)
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    model = longcat.build_megatron(config, EP2, scmoe, **dropout)
    longcat.load(model, checkpoint)
    rank = torch.distributed.get_rank()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    digests = []
    for step in range(steps):
        wrapped.zero_grad_buffer()
        models.forward(wrapped, *models.batch(2 * step + rank)).float().mean().backward()
        finalize_model_grads([wrapped])
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.main_grad.numpy().tobytes())
            parameter.data -= 0.1 * parameter.main_grad
        for buffer in model.buffers():
            digest.update(buffer.numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def test_biases_move_by_the_tokens_that_transformers_routes(folders):
    """One global batch of four micro-batches on two ranks, against transformers' own router."""
    folder, checkpoint, _ = folders["zero experts"]
    model = LongcatFlashForCausalLM.from_pretrained(folder)
    first, second = run_distributed(_biases_after_a_step, 2, str(folder), str(checkpoint))
    experts, zero, topk = (
        model.config.n_routed_experts,
        model.config.zero_expert_num,
        model.config.moe_topk,
    )
    chosen: list[list] = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, chosen):
        layer.mlp.router.register_forward_hook(lambda *args, seen=seen: seen.append(args[2][2]))
    with torch.no_grad():
        for index in range(4):
            model(models.batch(index)[0])
    for i, (layer, seen) in enumerate(zip(model.model.layers, chosen)):
        chosen_experts = torch.cat(seen).flatten()
        tokens = torch.bincount(chosen_experts, minlength=experts + zero).double()
        all_tokens = len(chosen_experts) / topk
        active = topk * experts / (experts + zero)
        moved = 0.05 * (active / (topk * experts) - tokens / (topk * all_tokens))
        moved[experts:] = 0
        assert moved.abs().max() > 1e-3
        expected = layer.mlp.router.e_score_correction_bias.double() + moved
        for biases in (first, second):
            assert np.allclose(biases[i], expected.numpy(), atol=1e-7, rtol=0)
        assert np.array_equal(first[i], second[i])


def _biases_after_a_step(folder: str, checkpoint: str) -> list[np.ndarray]:
    model = longcat.build_megatron(longcat.load_config(folder), EP2)
    longcat.load(model, checkpoint)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with torch.no_grad():  # an evaluation is not counted
        models.forward(wrapped, models.batch(9)[0])
    models.run_micro_batches([wrapped], 0, 4)
    return [
        buffer.numpy() for name, buffer in model.named_buffers() if name.endswith("expert_bias")
    ]


def test_biases_move_behind_a_function_that_a_loop_sets_later(folders):
    folder, checkpoint, _ = folders["zero experts"]
    run_distributed(_set_later, 1, str(folder), str(checkpoint))


def _set_later(folder: str, checkpoint: str) -> None:
    model = longcat.build_megatron(longcat.load_config(folder))
    longcat.load(model, checkpoint)
    calls: list = []
    model.config.finalize_model_grads_func = lambda chunks: calls.append(chunks)
    routers = [module for module in model.modules() if isinstance(module, ScMoERouter)]
    before = [router.expert_bias.clone() for router in routers]
    models.forward(model, *models.batch(0)).float().mean().backward()
    model.config.finalize_model_grads_func([model])
    assert calls == [[model]]
    after = [router.expert_bias.clone() for router in routers]
    assert not any(map(torch.equal, before, after))
    model.config.finalize_model_grads_func([model])  # as of a loop that calls the one it replaced
    assert all(torch.equal(router.expert_bias, bias) for router, bias in zip(routers, after))


LAYOUTS = ["EP2", "TP2+SP", "PP2", "EP2xTP2"]
RECOMPUTED = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)


@pytest.fixture(scope="module")
def steps(folders):
    """Loss and biases by block after one step of four micro-batches, by layout."""
    inputs = tuple(map(str, folders["zero experts"][:2]))
    found = {}
    for name in ["1 rank", *LAYOUTS]:
        layout = models.LAYOUTS[name]
        ranks = run_distributed(_step, layout["world_size"], *inputs, layout)
        found[name] = (ranks[0][0], {k: v for _, biases in ranks for k, v in biases.items()})
    (found["recomputed"],) = run_distributed(
        _step, 1, *inputs, models.LAYOUTS["1 rank"], RECOMPUTED
    )
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, "recomputed"])
def test_a_step_is_the_same_on_every_layout(steps, layout):
    loss, biases = steps["1 rank"]
    assert steps[layout][0] == pytest.approx(loss, rel=1e-6)  # fp32; sums in another order
    assert steps[layout][1].keys() == biases.keys() == {2, 4}
    for block, expected in biases.items():
        assert np.allclose(steps[layout][1][block], expected, atol=1e-7, rtol=0)


def _step(folder: str, checkpoint: str, layout: dict, changes: dict | None = None):
    model = longcat.build_megatron(longcat.load_config(folder), layout, **(changes or {}))
    longcat.load(model, checkpoint)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    loss = models.run_micro_batches([wrapped], 0, 4)
    routers = [module for module in model.modules() if isinstance(module, ScMoERouter)]
    return loss, {router.layer_number: router.expert_bias.numpy() for router in routers}


def test_every_token_may_go_to_zero_experts(folders):
    folder, checkpoint, _ = folders["more choices than experts"]
    for moved in run_distributed(_only_zero_experts, 2, str(folder), str(checkpoint)):
        assert moved == pytest.approx([0, 0], abs=1e-6)


def _only_zero_experts(folder: str, checkpoint: str) -> list[float]:
    """How far each MoE block's output is from x times the weights, and largest expert gradient."""
    config = longcat.load_config(folder)
    model = longcat.build_megatron(config, EP2, moe_router_topk=3)
    longcat.load(model, checkpoint)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer[config["n_routed_experts"] :] += 10
    modules = dict(model.named_modules())
    taps, outputs = [], []
    modules["decoder.layers.1.mlp.router"].register_forward_hook(
        lambda module, args, output: taps.append((args[0], output[2]))
    )
    collect = modules["decoder.layers.1"].path.collect
    modules["decoder.layers.1"].path.collect = lambda: outputs.append(collect()) or outputs[-1]
    _, gradients = models.loss_and_gradients(model, *models.batch(0))
    (tap, zero), (output,) = taps[0], outputs
    difference = (zero.add_to(torch.zeros_like(tap)) - output).abs().max().item()
    largest = max(float(g.abs().max()) for name, g in gradients.items() if "local_experts" in name)
    return [difference, largest]


def test_the_rule_of_the_biases():
    tokens = torch.tensor([5.0, 1.0, 3.0, 3.0, 8.0, 4.0])  # of 8 tokens with 3 choices each
    share = torch.tensor([5.0, 1.0, 3.0, 3.0]) / (3 * 8)
    expected = torch.cat([2.0 / (3 * 4) - share, torch.zeros(2)])  # two experts a token aimed at
    moved = bias_step(tokens, 4, target=2.0 / (3 * 4), rule="proportional")
    assert torch.allclose(moved, expected)
    assert torch.equal(bias_step(tokens, 4, 2.0 / (3 * 4), "sign"), expected.sign())
    assert torch.equal(bias_step(torch.zeros(6), 4, 0.0, "proportional"), torch.zeros(6))
