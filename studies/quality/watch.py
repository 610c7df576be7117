"""What is measured of a model while it is evaluated: routers and gates by block, right guesses."""

from pathlib import Path

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from megatron_scmoe.model.moe_layer import CombineGate


class Watch:
    """Hears every forward of routers and gates of a model while it is entered.

    Args:
        model: a module; its blocks have ``layer_number``.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._hooks: list = []
        self._names = {module: name for name, module in model.named_modules()}

    def __enter__(self) -> "Watch":
        for module in self._model.modules():
            listener = None
            if isinstance(module, TopKRouter):
                listener = self._hear_router
            elif isinstance(module, CombineGate):
                listener = self._hear_combine_gate
            elif isinstance(module, SharedExpertMLP) and module.gate_weight is not None:
                listener = self._hear_shared_gate
            if listener is not None:
                self._hooks.append(module.register_forward_hook(listener))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def routers(self) -> dict[str, dict[str, float]]:
        """By block: load of the busiest expert over the mean, load of the idlest, entropy of the scores
        over that of equal scores, and experts chosen by a token."""
        found = {}
        for block in self._blocks("load"):
            load, count = self._sums[block, "load"], self._sums[block, "tokens"]
            found[block] = {
                "load_max": float(load.max() / load.mean()),
                "load_min": float(load.min() / load.mean()),
                "entropy": float(self._sums[block, "entropy"] / count),
                "experts_per_token": float(load.sum() / count),
            }
        return found

    def gates(self) -> dict[str, list[float]]:
        """By block: the mean weight of the shared expert (CG-1), or of shared and routed (CG-2)."""
        return {
            block: (self._sums[block, "gate"] / self._sums[block, "gated"]).tolist()
            for block in self._blocks("gate")
        }

    def _blocks(self, what: str) -> list[str]:
        return sorted({block for block, name in self._sums if name == what}, key=int)

    def _add(self, module, what: str, value: torch.Tensor) -> None:
        name = self._names[module]
        block = name.split("layers.")[1].split(".")[0]
        key = (block, what)
        value = value.detach().double()
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _hear_router(self, router, inputs, outputs) -> None:
        tokens = inputs[0].detach().flatten(0, 1).float()
        chosen = outputs[1]
        logits = tokens @ router.weight.detach().float().t()
        if router.config.moe_router_score_function == "sigmoid":
            logits = torch.nn.functional.logsigmoid(logits)  # shares of the sum of all scores
        scores = torch.log_softmax(logits, dim=-1)
        equal = torch.log(torch.tensor(float(scores.shape[-1])))
        self._add(router, "load", chosen.sum(dim=0))
        self._add(router, "entropy", -(scores.exp() * scores).sum() / equal.to(scores.device))
        self._add(router, "tokens", torch.tensor(float(len(tokens)), device=scores.device))

    def _hear_combine_gate(self, gate, inputs, output) -> None:
        self._add_gate(gate, output.flatten(0, -2))

    def _hear_shared_gate(self, shared, inputs, output) -> None:
        logits = torch.nn.functional.linear(inputs[0].detach(), shared.gate_weight.detach())
        self._add_gate(shared, torch.sigmoid(logits).flatten(0, -2))

    def _add_gate(self, module, weights: torch.Tensor) -> None:
        self._add(module, "gate", weights.sum(dim=0))
        self._add(module, "gated", torch.tensor(float(len(weights)), device=weights.device))


class Guesses:
    """Counts while it is entered how often a model's likeliest token is the next one, by its kind.

    Kinds: ``all``; ``repeated``, this token has followed the one before it in this row already, so
    that it can be copied; ``bracket``, a closing one; ``name``, the rest of a name of code, behind or
    with an underscore.

    Args:
        model: called with tokens [b, s] first; returns logits [b, s, v].
        vocabulary: SentencePiece's list of pieces; without it there are the first two kinds alone.
    """

    def __init__(self, model: torch.nn.Module, vocabulary: Path):
        self._model = model
        self._members: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        if vocabulary.is_file():
            lines = vocabulary.read_text(encoding="utf-8").splitlines()
            pieces = [line.rsplit("\t", 1)[0] for line in lines]
            self._members["bracket"] = torch.tensor(
                [p.lstrip("\u2581")[:1] in set(")]}") for p in pieces]
            )
            self._members["name"] = torch.tensor(["_" in piece for piece in pieces])

    def __enter__(self) -> "Guesses":
        self._hook = self._model.register_forward_hook(self._hear)
        return self

    def __exit__(self, *error) -> None:
        self._hook.remove()

    def shares(self) -> dict[str, dict[str, float]]:
        """By kind the share of right guesses, and of how many."""
        return {
            kind: {"right": float(right / max(count, 1)), "tokens": int(count)}
            for kind, (right, count) in ((k, v.tolist()) for k, v in self._counts.items())
        }

    def _hear(self, model, inputs, logits) -> None:
        tokens = inputs[0]
        before, label = tokens[:, :-1], tokens[:, 1:]
        right = logits[:, :-1].argmax(dim=-1) == label
        real = label != 0  # what fills up the last row
        kinds = {"all": real, "repeated": real & has_been(before, label)}
        for kind, members in self._members.items():
            of_vocabulary = torch.zeros(logits.shape[-1], dtype=torch.bool, device=tokens.device)
            of_vocabulary[: len(members)] = members.to(tokens.device)
            is_member = of_vocabulary[label]
            if kind == "name":
                is_member = is_member | of_vocabulary[before]
            kinds[kind] = real & is_member
        for kind, mask in kinds.items():
            found = torch.stack([(right & mask).sum(), mask.sum()])
            self._counts[kind] = self._counts.get(kind, 0) + found


def has_been(before: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Whether the pair of a token and its label stands earlier in the row; all [b, n]."""
    pairs = before * (int(label.max()) + 1) + label
    same = pairs[:, :, None] == pairs[:, None, :]
    return same.tril(diagonal=-1).any(dim=-1)
