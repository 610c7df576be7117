"""Rules of the schedule: the experts' slot, how it is measured, and chunks."""

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.overlap.schedule import num_slots
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


@rule("--scmoe-operator-times", "--scmoe-expert-slot")
def operator_times_are_for_slot_auto(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.operator_times and scmoe.expert_slot != "auto":
        raise ScMoEConfigError(
            f"--scmoe-operator-times {scmoe.operator_times} without --scmoe-expert-slot auto",
            "nothing would read or write it",
            "--scmoe-expert-slot auto, or leave the flag out",
        )


@rule("--scmoe-expert-slot", "--no-scmoe-overlap")
def slot_auto_needs_overlap(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.expert_slot == "auto" and not scmoe.overlap:
        raise ScMoEConfigError(
            "--scmoe-expert-slot auto with --no-scmoe-overlap",
            "without overlap every slot takes the same time",
            "--scmoe-overlap, or a number",
        )


@rule("--scmoe-expert-slot", "--fp8-format", "--fp4-format")
def slot_auto_is_not_measured_in_fp8(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.expert_slot != "auto":
        return
    for name in ("fp8", "fp4"):
        if getattr(settings, name):
            raise ScMoEConfigError(
                f"--scmoe-expert-slot auto with --{name}-format {getattr(settings, name)}",
                "measuring would enter its amax history",
                _numbered_slots(scmoe),
            )


@rule("--scmoe-expert-slot", "--init-model-with-meta-device")
def slot_auto_needs_weights(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.expert_slot == "auto" and settings.init_model_with_meta_device:
        raise ScMoEConfigError(
            "--scmoe-expert-slot auto with --init-model-with-meta-device",
            "the model has no weights yet when it would be measured",
            _numbered_slots(scmoe),
        )


@rule("--scmoe-expert-slot")
def slot_is_one_of_the_taps(scmoe: ScMoEConfig, settings: Settings) -> None:
    slot, last = scmoe.expert_slot, num_slots(scmoe.tap) - 1
    if isinstance(slot, int) and not 0 <= slot <= last:
        raise ScMoEConfigError(
            f"--scmoe-expert-slot {slot}",
            f"--scmoe-tap {scmoe.tap} has the slots 0 to {last}",
            str(min(max(slot, 0), last)),
        )


@rule("--scmoe-chunks")
def there_is_a_chunk(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.chunks < 1:
        raise ScMoEConfigError(f"--scmoe-chunks {scmoe.chunks}", "it counts chunks", "1 or more")


@rule("--scmoe-chunks", "--moe-pad-expert-input-to-capacity")
def chunks_are_not_padded_to_capacity(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.chunks > 1 and settings.moe_pad_expert_input_to_capacity:
        raise ScMoEConfigError(
            f"--scmoe-chunks {scmoe.chunks} with --moe-pad-expert-input-to-capacity",
            "the capacity counts the tokens of all chunks",
            "--scmoe-chunks 1",
        )


@rule("--scmoe-chunks", "--moe-router-padding-for-quantization")
def chunks_are_not_padded_by_the_router(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.chunks > 1 and settings.moe_router_padding_for_quantization:
        raise ScMoEConfigError(
            f"--scmoe-chunks {scmoe.chunks} with --moe-router-padding-for-quantization",
            "the router pads the tokens of all chunks together",
            "--scmoe-chunks 1, or leave the flag out",
        )


def _numbered_slots(scmoe: ScMoEConfig) -> str:
    return f"a number: 0 to {num_slots(scmoe.tap) - 1}"
