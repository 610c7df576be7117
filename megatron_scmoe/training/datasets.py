"""The datasets of training, validation and test, as the flags name them."""

from functools import partial

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_scmoe.training import data_identity, input_checks


def datasets_provider(num_samples, vp_stage: int | None = None):
    """Megatron's train, validation and test datasets with ``num_samples`` samples each."""
    args = get_args()
    config = dataset_config(args, get_tokenizer())
    kind = MockGPTDataset if args.mock_data else GPTDataset
    data_identity.keep(args, input_checks.prefixes(args))
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        kind, samples_needed(args, num_samples), partial(_needs_data, vp_stage=vp_stage), config
    ).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks for it


def samples_needed(args, num_samples) -> list[int | None]:
    """Samples of training, validation and test, so that a run that goes on has its steps.

    Megatron counts all steps by this run's batch. If the earlier ones had a larger batch, more has been
    read than that, and its loop would find no sample left. Its loaders want one to be left also with
    ``--eval-iters 0``, of which a blend of datasets makes none.

    Args:
        num_samples: as Megatron counts them; None for all there are.
    """
    train, valid, test = num_samples
    test = test if test is None else max(test, 1)
    if args.skip_train or args.phase_transition_iterations or not args.train_iters:
        return [train, valid, test]
    steps = args.train_iters - args.iteration
    train = max(train, args.consumed_train_samples + steps * args.global_batch_size)
    if valid is not None:
        evaluations = args.train_iters // args.eval_interval - args.iteration // args.eval_interval
        each = args.eval_iters * args.eval_global_batch_size
        valid = max(valid, args.consumed_valid_samples + max((evaluations + 1) * each, 1))
    return [train, valid, test]


def dataset_config(args, tokenizer) -> GPTDatasetConfig:
    """What Megatron's ``pretrain_gpt.py`` makes of the flags, but for those that are refused."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        data_parallel_size=args.data_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _needs_data(vp_stage: int | None) -> bool:
    """Whether this rank reads the datasets: the first TP rank of the first and last stage."""
    return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0
