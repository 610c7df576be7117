"""Models that a Hugging Face format cannot express are refused by flag, in either format."""

import pytest
import torch

from megatron_scmoe.checkpoints.formats import longcat_flash, scmoe
from megatron_scmoe.checkpoints.formats.refusals import IN_NO_FORMAT
from megatron_scmoe.checkpoints.model_arguments import arguments_from_flags
from megatron_scmoe.errors import ConversionError
from tests.longcat import CONFIG
from tests.unit.checkpoints.test_longcat_flash import parse

FLAGS = {
    "scmoe": """--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-experts 4
        --moe-layer-freq [0,1]*2 --moe-shared-expert-intermediate-size 48 --swiglu
        --max-position-embeddings 64 --position-embedding-type rope
        --disable-bias-linear --moe-router-topk 2 --moe-token-dispatcher-type alltoall""".split(),
    "longcat_flash": longcat_flash.megatron_flags(CONFIG),
}
CONFIGS = {"scmoe": scmoe.FORMAT.config, "longcat_flash": longcat_flash.FORMAT.config}

IN_NEITHER = {
    "num_experts": "",
    "rotary_interleaved": "--rotary-interleaved",
    "no_rope_freq": "--no-rope-freq 2",
    "qk_l2_norm": "--qk-l2-norm",
    "window_size": "--window-size (4,0)",
    "softmax_type": "--softmax-type learnable",
    "attention_output_gate": "--attention-output-gate",
    "apply_residual_connection_post_layernorm": "--apply-residual-connection-post-layernorm",
    "glu_linear_offset": "--glu-linear-offset 1.0",
    "activation_func_clamp_value": "--activation-func-clamp-value 3",
    "use_mup": "--use-mup",
    "fp32_residual_connection": "--fp32-residual-connection",
    "mtp_num_layers": "--mtp-num-layers 1",
    "moe_latent_size": "--moe-latent-size 8",
    "moe_apply_probs_on_input": "--moe-apply-probs-on-input",
    "moe_expert_capacity_factor": "--moe-expert-capacity-factor 1.0",
    "moe_router_force_load_balancing": "--moe-router-force-load-balancing",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type sinkhorn",
}
"""By the argument's name: flags that set it to what no format has."""

NOT_IN_LONGCAT = [
    "--apply-layernorm-1p",
    "--use-rope-scaling",
    "--rotary-seq-len-interpolation-factor 2",
    "--rotary-percent 0.5",
    "--moe-router-num-groups 2 --moe-router-group-topk 1",
    "--moe-router-enable-expert-bias",
    "--moe-router-dtype fp64",
]


@pytest.mark.parametrize("model_type", FLAGS)
def test_without_them_there_is_a_configuration(model_type):
    args = arguments_from_flags(FLAGS[model_type], torch.float32, 64)
    assert CONFIGS[model_type](args, 64, 64)["model_type"] == model_type


@pytest.mark.parametrize("model_type", FLAGS)
@pytest.mark.parametrize("name,flag", [row[:2] for row in IN_NO_FORMAT])
def test_what_no_format_has_is_refused(model_type, name, flag):
    args = parse([*FLAGS[model_type], *IN_NEITHER[name].split()])
    if not IN_NEITHER[name]:
        setattr(args, name, None)
    with pytest.raises(ConversionError, match=f"^{flag}.*{model_type} model in trans") as caught:
        CONFIGS[model_type](args, 64, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", NOT_IN_LONGCAT)
def test_what_longcat_has_not_is_refused(flags):
    args = parse([*FLAGS["longcat_flash"], *flags.split()])
    with pytest.raises(ConversionError, match=f"^{flags.split()[0]} is .*has no other than"):
        CONFIGS["longcat_flash"](args, 64, 64)
