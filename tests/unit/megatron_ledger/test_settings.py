"""Flags and settings are still as this package takes them.

A test that fails says that Megatron has changed there. Read its row in docs/megatron.md, then drop the
departure or fit it to the new Megatron.
"""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest
from megatron.core.datasets import blended_megatron_dataset_config
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.training import checkpointing, training
from megatron.training.argument_utils import ArgumentGroupFactory, TypeInferenceError
from megatron.training.models.gpt import GPTModelConfig

from megatron_scmoe.checkpoints import model_arguments, output_folder
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.platform import log_filters
from megatron_scmoe.training import lr_schedule, saving_checks
from tests.unit.megatron_ledger.source import megatron_parser, row, source

# Flags.


@row("ArgumentGroupFactory._format_arg_name")
def test_a_flag_has_no_prefix():
    assert ArgumentGroupFactory(ScMoEConfig)._format_arg_name("tap") == "--tap"


@row("ArgumentGroupFactory._extract_type")
def test_a_union_has_no_type():
    with pytest.raises(TypeInferenceError):
        ArgumentGroupFactory(ScMoEConfig)._extract_type(
            ScMoEConfig.__dataclass_fields__["expert_slot"].type
        )


@row("ArgumentGroupFactory._build_argparse_kwargs_from_field")
def test_an_argument_has_no_prefix():
    field = ScMoEConfig.__dataclass_fields__["tap"]
    kwargs = ArgumentGroupFactory(ScMoEConfig)._build_argparse_kwargs_from_field(field)
    assert kwargs["dest"] == "tap"


# Settings that Megatron parses and does not pass on, or cannot have.


@row("megatron.training.argument_utils.core_transformer_config_from_args")
def test_openai_gelu_is_not_read_and_xavier_has_another_name():
    text = source("megatron.training.argument_utils.core_transformer_config_from_args")
    assert "activation_func" in text and "openai_gelu" not in text
    assert "kw_args['scaled_init_method'] = torch.nn.init.xavier_uniform_" in text
    assert "scaled_init_method" not in TransformerConfig.__dataclass_fields__


@row("megatron.training.argument_utils.gpt_config_from_args")
def test_two_flags_are_not_read():
    text = source("megatron.training.argument_utils.gpt_config_from_args")
    assert "rope_scaling_factor" not in text and "te_rng_tracker" not in text
    assert "rope_scaling_factor" in GPTModelConfig.__dataclass_fields__


@row("GPTModelConfig.transformer")
def test_the_model_config_holds_the_inner_one():
    assert "transformer" in GPTModelConfig.__dataclass_fields__


@row("megatron.training.arguments.add_megatron_arguments")
def test_fused_kernels_are_on_by_default():
    defaults = vars(megatron_parser().parse_args([]))
    on = ("apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion")
    on += ("bias_gelu_fusion", "bias_dropout_fusion")
    assert [name for name in on if not defaults[name]] == []


@row("megatron.training.arguments.validate_args")
def test_these_are_derived():
    text = source("megatron.training.arguments.validate_args")
    for fact in (
        "args.kv_channels = args.hidden_size // args.num_attention_heads",
        "args.moe_ffn_hidden_size = args.ffn_hidden_size",
        "args.ffn_hidden_size = 4 * args.hidden_size",
        "args.moe_aux_loss_coeff = args.moe_aux_loss_coeff[0]",
        "os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS') == '1'",
        "legacy_default_split_value = '969, 30, 1'",
    ):
        assert fact in text, fact


# Copied from Megatron.


@row("megatron.training.training.get_optimizer_param_scheduler")
def test_lengths_of_the_schedule_are_the_same():
    of_iterations = dict(train_iters=10, train_samples=None, lr_warmup_iters=2, lr_decay_iters=None)
    of_samples = dict(
        train_iters=None, train_samples=80, lr_warmup_samples=8, lr_decay_samples=None
    )
    for lengths in (of_iterations, of_iterations | {"lr_warmup_fraction": 0.1}, of_samples):
        args = megatron_parser().parse_args(["--lr", "1e-3", "--global-batch-size", "4"])
        vars(args).update(start_weight_decay=0.1, end_weight_decay=0.1, **lengths)
        mine = {name: value for name, (value, _) in lr_schedule._schedule(args).items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "get_args", lambda args=args: args)
            patch.setattr(training, "update_train_iters", lambda args: None)
            patch.setattr(training, "OptimizerParamScheduler", lambda optimizer, **kwargs: kwargs)
            theirs = training.get_optimizer_param_scheduler(None)
        assert mine == {name: theirs[name] for name in mine}


@row("megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory")
def test_bytes_of_a_parameter_are_the_same():
    name = "megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory"
    given = f"{saving_checks._MEGATRON_BYTES} if not args.use_distributed_optimizer"
    assert given in source(name)


@row("RotaryEmbedding._apply_scaling")
def test_constants_of_llama_3_are_the_same():
    theirs = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    mine = model_arguments.LLAMA3_ROPE
    assert mine == {name: theirs[name].default for name in mine}


@row("megatron.core.datasets.blended_megatron_dataset_config.parse_and_normalize_split")
def test_a_split_is_read_alike():
    text = inspect.getsource(blended_megatron_dataset_config.parse_and_normalize_split)
    assert 're.findall(r"[.0-9]+", split)' in text


@row("megatron.training.checkpointing.get_checkpoint_tracker_filename")
def test_the_file_has_the_same_name():
    name = checkpointing.get_checkpoint_tracker_filename("x")
    assert name == f"x/{output_folder.TRACKER}"


@row("ShardedObject.unique_key")
def test_keys_and_extra_states_are_as_written():
    assert ShardedObject("a", None, (2,), (1,)).unique_key == "a/shard_1_2"
    assert "_extra_state" in inspect.getsource(ColumnParallelLinear)


@row("torch.distributed.checkpoint.DefaultLoadPlanner.load_bytes")
def test_the_planner_unpickles_anything():
    assert "weights_only=False" in source("DefaultLoadPlanner.load_bytes")


@row("pretrain_gpt.py")
def test_the_wheel_has_no_scripts():
    for module in ("pretrain_gpt", "gpt_builders", "model_provider"):
        assert importlib.util.find_spec(module) is None


@row("megatron.training.arguments.parse_args")
def test_the_judges_have_these_names():
    for module, name in (
        ("megatron.training.arguments", "parse_args"),
        ("megatron.training.arguments", "validate_args"),
        ("megatron.training.argument_utils", "core_transformer_config_from_args"),
    ):
        assert inspect.isfunction(getattr(importlib.import_module(module), name))


@row("logging.Filter")
def test_megatron_still_says_it():
    warned = [(module, message) for message, module in log_filters._WARNINGS_OF_A_GPU]
    logged = [(module, message) for module, message, _ in log_filters._LOGGED]
    for module, message in warned + logged:
        begins, _, _ = message.partition("0.0.0")  # a version
        assert begins in text_constants(module), (module, message)


def test_pytorch_still_says_it():
    said = "".join(
        text_constants(f"torch.distributed.{module}")
        for module in ("checkpoint.state_dict_loader", "checkpoint.utils", "_shard._utils")
    )
    for message, _ in log_filters._WARNINGS_OF_LOADING:
        name = " of load has"  # of the function
        assert all(part in said for part in message.replace(name, " of | has").split("|"))


def text_constants(module: str) -> str:
    """All text in a module, formatted parts left out."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    found = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(text for text in found if isinstance(text, str))
