"""Loss, perplexity and logits of a Hugging Face model, by transformers."""

import os
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_scmoe.checkpoints.vocabulary import count_tokens
from megatron_scmoe.errors import InputError, in_words
from megatron_scmoe.evaluation.sequences import (
    NO_LABEL,
    Report,
    Sequences,
    batches,
    check_space,
    logits_file,
)
from megatron_scmoe.platform import cpu_backend


class HuggingFaceModel:
    """A Hugging Face folder, evaluated by transformers in this process.

    Args:
        folder: with config.json, weights and, for a text, tokenizer.
        trust_remote_code: whether code in the folder may run.

    Raises:
        InputError: here and in the methods, if transformers cannot load it.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False):
        from transformers import AutoConfig  # takes seconds, which --load need not wait for

        self.folder = folder
        self.trust = dict(trust_remote_code=trust_remote_code)
        if not os.path.isdir(folder):
            raise InputError(f"--hf {folder}", "there is no such folder", "a model folder")
        with self._errors():
            self.config = AutoConfig.from_pretrained(folder, **self.trust).get_text_config()

    @cached_property
    def vocab_size(self) -> int:
        """How many of a token's logits are those of tokens; an export may hold padding as well."""
        from transformers import AutoTokenizer

        from megatron_scmoe.checkpoints.tokenizers import has_tokenizer  # it imports transformers

        rows, declared = self.config.vocab_size, getattr(self.config, "unpadded_vocab_size", None)
        entries = None
        if declared and has_tokenizer(Path(self.folder)):  # to which tokens may have been added
            with self._errors():
                entries = len(AutoTokenizer.from_pretrained(self.folder, **self.trust))
        return count_tokens(rows, declared, entries)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence can have by the configuration."""
        return getattr(self.config, "max_position_embeddings", 1 << 30)

    def check_length(self, length: int) -> None:
        """Refuse a sequence that is longer than the model has positions, unless it rotates."""
        rotates = getattr(self.config, "rope_parameters", None)
        if length > self.max_length and not rotates:
            raise InputError(
                f"a sequence length of {length}",
                f"the model in {self.folder} has {self.max_length} positions",
                f"--sequence-length {self.max_length} or less",
            )

    def tokenize(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [n], with the special tokens that the tokenizer adds: so Megatron's
        tokenizers read a text, and so the model was trained."""
        from transformers import AutoTokenizer

        if not any(any(Path(self.folder).glob(name)) for name in _OF_TOKENIZERS):
            raise InputError(
                f"--hf {self.folder}",
                "it has no tokenizer to read a text with",
                "a folder with its tokenizer's files, or --tokens FILE",
            )
        with self._errors():
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.trust)
        return np.array(tokenizer(text)["input_ids"], dtype=np.int64)

    @torch.no_grad()
    def evaluate(
        self,
        sequences: Sequences,
        micro_batch: int = 1,
        logits_out: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Report:
        """As ``evaluate`` of perplexity.py; ``dtype`` None is that of the files."""
        from transformers import AutoModelForCausalLM

        shape = (*sequences.tokens.shape, self.vocab_size)
        if logits_out:
            check_space(logits_out, shape)
        with self._errors():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
                **self.trust,
            )
        self._check_tensors(loaded)
        device = "cpu" if cpu_backend.is_enabled() else "cuda"
        model = model.to(device).eval()
        losses, count = [0.0, 0.0], 0  # over the tokens, and over the padding rows too
        target = logits_file(logits_out, shape) if logits_out else nullcontext()
        with target as file, tqdm(total=shape[0], unit=" seq", disable=None) as bar:
            for batch in batches(sequences, micro_batch, 1):
                tokens = torch.from_numpy(batch.tokens[: batch.count]).to(device)
                labels = torch.from_numpy(batch.labels[: batch.count]).to(device)
                logits = model(tokens).logits.float()
                for index, size in enumerate((self.vocab_size, None)):
                    losses[index] += torch.nn.functional.cross_entropy(
                        logits[..., :size].flatten(0, 1),
                        labels.flatten(),
                        ignore_index=NO_LABEL,
                        reduction="sum",
                    ).item()
                count += int((labels != NO_LABEL).sum())
                if file is not None:
                    file[batch.start : batch.start + batch.count] = (
                        logits[..., : self.vocab_size].cpu().numpy()
                    )
                bar.update(batch.count)
        padded = losses[1] / count if self.vocab_size != self.config.vocab_size else None
        return Report(losses[0] / count, count, shape[0], padded)

    def _check_tensors(self, loaded: dict) -> None:
        """Refuse weights that transformers would leave at random, or leave out, with a warning.

        ``loaded`` is its report, without tied weights and what the model declares dispensable.
        """
        flaws = {
            "is missing": sorted(loaded["missing_keys"]),
            "is left over, the model has none": sorted(loaded["unexpected_keys"]),
        }
        for name, found, expected in sorted(loaded["mismatched_keys"]):
            flaws[f"has the shape {list(found)} instead of {list(expected)}"] = [name]
        for flaw, names in flaws.items():
            if names:
                others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise InputError(
                    f"--hf {self.folder}",
                    f"tensor {names[0]} {flaw}{others}",
                    "a folder whose tensors are those that its config.json describes",
                )

    @contextmanager
    def _errors(self):
        try:
            yield
        except Exception as error:  # transformers raises what it likes
            reason = in_words(error, lines=1)
            if "`CONVERSION`" in reason:  # it refers to a report in the log
                reason = "tensors that it stacks, as those of experts, do not fit together"
            raise InputError(
                f"--hf {self.folder}",
                f"transformers cannot load it ({reason})",
                "a folder with config.json, weights and tokenizer; with code: --trust-remote-code",
            ) from error


_OF_TOKENIZERS = ("tokenizer*", "tokenization_*.py", "vocab*", "*.model", "merges.txt")
"""Files of which a Hugging Face folder with a tokenizer has one."""
