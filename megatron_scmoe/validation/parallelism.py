"""Rules of tensor, context and pipeline parallelism."""

from collections.abc import Iterable, Iterator

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_scmoe.config import ScMoEConfig, needs_dense_partner
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings, final_config


@rule("--tensor-model-parallel-size", "--sequence-parallel")
def tensor_parallel_ranks_have_tokens_of_their_own(scmoe: ScMoEConfig, settings: Settings) -> None:
    """Megatron's MoE refuses this in its forward: gradients of experts and router would be wrong."""
    size = settings.tensor_model_parallel_size or 1
    if size > 1 and not settings.sequence_parallel:
        raise ScMoEConfigError(
            f"--tensor-model-parallel-size {size} without --sequence-parallel",
            "every tensor-parallel rank would send the same tokens to the experts",
            "--sequence-parallel",
        )


@rule("--context-parallel-size", "--transformer-impl")
def local_attention_has_no_context_parallelism(scmoe: ScMoEConfig, settings: Settings) -> None:
    size = settings.context_parallel_size or 1
    if settings.transformer_impl == "local" and size > 1:
        raise ScMoEConfigError(
            f"--context-parallel-size {size} with --transformer-impl local",
            "Megatron's local attention knows no context parallelism",
            "--transformer-impl transformer_engine, or --context-parallel-size 1",
        )


@rule(
    "--pipeline-model-parallel-size",
    "--num-virtual-stages-per-pipeline-rank",
    "--pipeline-model-parallel-layout",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
def pipeline_stages_hold_whole_pairs(scmoe: ScMoEConfig, settings: Settings) -> None:
    """Judged when the configuration is final: Megatron derives the stages from several flags."""
    config = final_config(settings)
    if config is None or config.pipeline_model_parallel_size == 1:
        return
    if not needs_dense_partner(scmoe):
        return
    for first, count in _stages(config):
        split = first if first % 2 else first + count
        if split % 2:
            given, nearest = _given_and_nearest(config)
            raise ScMoEConfigError(
                given,
                f"a pipeline stage would split the pair of blocks {split} and {split + 1} "
                f"of {config.num_layers}",
                nearest,
            )


def _stages(config: TransformerConfig) -> Iterator[tuple[int, int]]:
    """First block (from 0) and number of blocks of each (virtual) pipeline stage."""
    layout = config.pipeline_model_parallel_layout
    virtual = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual) if virtual else (None,):
        for pp_rank in range(config.pipeline_model_parallel_size):
            if layout is not None:
                blocks = layout.get_layer_id_list(
                    layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
                )
                if blocks:
                    yield blocks[0], len(blocks)
            else:
                count = get_num_layers_to_build(config, vp_stage, pp_rank)
                if count:
                    yield get_transformer_layer_offset(config, vp_stage, pp_rank), count


def _given_and_nearest(config: TransformerConfig) -> tuple[str, str]:
    """The flag that decides the layout, with its value, and the nearest valid one."""
    pairs = config.num_layers // 2
    size = config.pipeline_model_parallel_size
    if config.pipeline_model_parallel_layout is not None:
        return (
            f"--pipeline-model-parallel-layout {config.pipeline_model_parallel_layout}",
            "a layout with an even number of decoder blocks ('tt') in each stage",
        )
    for end in ("first", "last"):
        number = getattr(config, f"num_layers_in_{end}_pipeline_stage")
        if number is not None:
            return f"--decoder-{end}-pipeline-num-layers {number}", "even numbers for every stage"
    for part in ("embedding", "loss"):
        if getattr(config, f"account_for_{part}_in_pipeline_split"):
            return (
                f"--account-for-{part}-in-pipeline-split",
                "a --pipeline-model-parallel-layout with an even number of blocks in each stage",
            )
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual and pairs % size == 0:
        nearest = _nearest_divisors(pairs // size, virtual)
        blocks = (config.num_layers // (size * number) for number in nearest)
        return (  # either flag may have been given: Megatron keeps one number
            f"--num-virtual-stages-per-pipeline-rank {virtual}",
            f"{_either(nearest)}, which is --num-layers-per-virtual-pipeline-stage {_either(blocks)}",
        )
    return f"--pipeline-model-parallel-size {size}", _either(_nearest_divisors(pairs, size))


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    distance = min(abs(d - wanted) for d in divisors)
    return [d for d in divisors if abs(d - wanted) == distance]


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))
