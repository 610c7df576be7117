"""The flags that say how data is read reach Megatron's datasets."""

from argparse import Namespace
from dataclasses import fields
from types import SimpleNamespace

import pytest
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_scmoe.arguments import defaults
from megatron_scmoe.training.datasets import dataset_config, samples_needed

NOT_FLAGS = {
    "split_matrix": "computed",
    "mock": "computed",
    "token_dtype_code": "computed",
    "drop_last_partial_validation_sequence": "of T5",
    "add_extra_token_to_sequence": "of T5",
}
REFUSED = {
    "fast_cache_load": "--dataloader-fast-cache-load",
    "sequences_per_dataset": "--per-dataset-sequences-path",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "inter_document_masking": "--dataloader-inter-document-masking",
}
"""Fields that stay as they are: ``pretrain._FOREIGN`` refuses their flags."""


def config(**given) -> GPTDatasetConfig:
    args = Namespace(**defaults() | {"seq_length": 8, "split": "1,1,1"} | given)
    args.data_parallel_size = 1
    return dataset_config(args, tokenizer=SimpleNamespace(vocab_size=8))


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"allow_ambiguous_pad_tokens": True}, "allow_ambiguous_pad_tokens", True),
        ({"object_storage_cache_path": "cache"}, "object_storage_cache_path", "cache"),
        (
            {"dataloader_defer_npy_index_mmap": True, "data_cache_path": "cache"},
            "defer_npy_index_mmap",
            True,
        ),
        ({"mmap_bin_files": False}, "mmap_bin_files", False),
        ({"eod_mask_loss": True}, "eod_mask_loss", True),
        ({"reset_position_ids": True}, "reset_position_ids", True),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            "sequence_parallel_size",
            4,
        ),
    ],
)
def test_a_flag_reaches_the_datasets(given, field, value):
    assert getattr(config(), field) != value
    assert getattr(config(**given), field) == value


def test_every_field_of_megatrons_is_accounted_for(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "megatron_scmoe.training.datasets.GPTDatasetConfig", lambda **given: seen.update(given)
    )
    config()
    assert {field.name for field in fields(GPTDatasetConfig)} == {*seen, *NOT_FLAGS, *REFUSED}


class TestSamplesOfARunThatGoesOn:
    """After 20 steps of 16 samples, and two evaluations of 3 batches; 30 steps in all."""

    def needed(self, num_samples=(30 * 16, 4 * 3 * 16, 3 * 16), **changes) -> list:
        batch = changes.setdefault("global_batch_size", 16)
        changes["eval_global_batch_size"] = batch  # as Megatron sets it
        done = dict(iteration=20, consumed_train_samples=320, consumed_valid_samples=96)
        flags = dict(train_iters=30, eval_interval=10, eval_iters=3)
        return samples_needed(Namespace(**defaults() | done | flags | changes), num_samples)

    def test_the_same_batch_needs_what_megatron_counts(self):
        assert self.needed() == [30 * 16, 4 * 3 * 16, 3 * 16]

    def test_a_smaller_batch_needs_more_than_megatron_counts(self):
        counted = (30 * 2, 4 * 3 * 2, 3 * 2)
        assert self.needed(counted, global_batch_size=2) == [320 + 10 * 2, 96 + 2 * 3 * 2, 3 * 2]

    def test_a_larger_batch_needs_less_and_megatrons_count_stays(self):
        counted = (30 * 32, 4 * 3 * 32, 3 * 32)
        assert self.needed(counted, global_batch_size=32) == list(counted)

    def test_a_run_that_evaluates_nothing_has_a_sample_left(self):
        counted = (30 * 16, 0, 0)
        assert self.needed(counted, eval_iters=0) == [30 * 16, 96 + 1, 1]

    def test_all_there_are(self):
        assert self.needed((30 * 16, None, 3 * 16))[1] is None
