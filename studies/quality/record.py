"""Train one model and record what another program needs to train it again; parity.py starts it.

    python -m studies.quality.record RECORD TOKENS scmoe|stock FLAGS ...

The arguments are those of train.py. RECORD is a file of ``torch.save``: ``weights``, the model's
state before the first step, by Megatron's names; ``tokens`` and ``labels`` [n, b, s], one entry a
step; ``losses``, the training loss of each step in nats a token.
"""

from pathlib import Path

from megatron_scmoe.platform import launch
from megatron_scmoe.platform.command_line import run_command
from studies.quality import train


def main(record: Path, tokens: Path, kind: str) -> None:
    """Train as the flags in ``sys.argv`` say, and write the record."""
    launch.before_megatron()
    import torch

    recorder = _Recorder()
    train.start(tokens, kind)
    torch.save(recorder.found(), record)


class _Recorder:
    """Stands around Megatron's loop."""

    def __init__(self) -> None:
        from megatron.training import training

        self._weights: dict = {}
        self._tokens: list = []
        self._labels: list = []
        self._losses: list = []
        self._train, training.train = training.train, self._trained
        self._log, training.training_log = training.training_log, self._logged

    def found(self) -> dict:
        """The record."""
        import torch

        return {
            "weights": self._weights,
            "tokens": torch.stack(self._tokens),
            "labels": torch.stack(self._labels),
            "losses": [float(loss) for loss in self._losses],
        }

    def _trained(self, forward_step, model, *args, **kwargs):
        import torch
        from megatron.core.utils import unwrap_model

        gpt = unwrap_model(model[0])
        self._weights = {
            name: tensor.detach().cpu().clone()
            for name, tensor in gpt.state_dict().items()
            if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state")
        }
        gpt.register_forward_pre_hook(self._hear, with_kwargs=True)
        return self._train(forward_step, model, *args, **kwargs)

    def _hear(self, model, inputs, words) -> None:
        self._tokens.append(inputs[0].cpu().int())
        self._labels.append(words["labels"].cpu().int())

    def _logged(self, losses, *args, **kwargs):
        self._losses.append(losses["lm loss"].detach().clone())
        return self._log(losses, *args, **kwargs)


if __name__ == "__main__":
    run_command(lambda: main(*train.arguments(__doc__, "RECORD")))
