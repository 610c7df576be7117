"""What is replaced at run time still has to be.

A test that fails says that Megatron has changed there. Read its row in docs/megatron.md, then drop the
departure or fit it to the new Megatron.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import dict_utils
from torch.utils.data import DataLoader, TensorDataset

from megatron_scmoe.training import optimizer_state
from tests.unit.megatron_ledger.source import (
    definition,
    megatron_parser,
    row,
    source,
)

# Replaced at run time.


@row("megatron.core.datasets.utils.compile_helpers")
def test_make_is_run_without_a_makefile():
    module = importlib.import_module("megatron.core.datasets.utils")
    assert "make" in source("megatron.core.datasets.utils.compile_helpers")
    assert not Path(module.__file__).with_name("Makefile").exists()
    assert importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


@row("megatron.core.transformer.transformer_block._get_block_submodules")
def test_a_block_refuses_a_function_as_its_spec():
    text = source("megatron.core.transformer.transformer_block._get_block_submodules")
    assert "raise Exception(f'specialize for {type(spec).__name__}.')" in text
    assert "callable(" not in text and "isfunction(" not in text


@row("megatron.training.training.training_log")
def test_no_interval_ends_with_the_first_iteration():
    text = source("megatron.training.training.training_log")
    assert "should_reset = not is_first_iteration" in text
    assert "if iteration % args.log_interval == 0 or is_first_iteration:" in text


@row("torch.profiler.schedule")
def test_steps_are_counted_from_the_start_and_ended_by_the_iteration():
    assert "wait=max(args.profile_step_start - 1, 0)," in source("megatron.training.training.train")
    text = source("megatron.training.training.post_training_step_callbacks")
    assert "and iteration == args.profile_step_end" in text


@row("megatron.training.activation_logging.LINEAR_TYPES")
def test_mocks_are_among_the_types():
    text = source("megatron.training.activation_logging._discover_te_types")
    assert "all_types.extend([TELinear, TENorm, TEColumnParallelLinear" in text
    assert "isinstance(module, module_types)" in source(
        "megatron.training.activation_logging._register_hooks"
    )


@row("megatron.core.transformer.utils._sequence_parallel_attr_cache")
def test_modules_are_remembered_by_a_models_address():
    text = source("megatron.core.transformer.utils._init_sequence_parallel_cache")
    assert "model_id = id(model)" in text
    assert "model_id in _sequence_parallel_attr_cache" in text


@row("ChainedOptimizer.load_state_dict")
def test_states_of_another_number_of_optimizers_are_refused():
    chain = SimpleNamespace(chained_optimizers=[None, None])
    with pytest.raises(RuntimeError, match="Expected 2 entries"):
        optimizer_state._load_one_state(chain, {"one": "state"})


@row("ChainedOptimizer.sharded_state_dict")
def test_groups_are_merged_by_number_and_sgd_has_no_state_to_load_into():
    with pytest.raises(ValueError, match="Cannot merge two lists with different lengths"):
        dict_utils.merge({"param_groups": [{}]}, {"param_groups": [{}, {}]})
    choice = source("megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups")
    sgd = choice[choice.index("config.optimizer == 'sgd'") :]
    assert "init_state_fn = None" in sgd[: sgd.index("else:")]
    assert "self.init_state_fn(self.optimizer, self.config)" in source(
        "FP32Optimizer.sharded_state_dict"
    )


@row("OptimizerParamScheduler.load_state_dict")
def test_the_first_step_has_not_the_weight_decay_of_the_checkpoint():
    text = source("OptimizerParamScheduler.load_state_dict")
    assert text.index("self.step(increment=num_steps)") < text.index("self.start_wd = ")
    kept = source("OptimizerParamScheduler.state_dict")
    assert "wsd" not in kept and "init_lr" not in kept  # lr_schedule._not_stored


@row("megatron.training.training.update_train_iters")
def test_iterations_are_counted_as_if_none_were_done():
    text = source("megatron.training.training.update_train_iters")
    assert "args.train_iters = args.train_samples // args.global_batch_size" in text
    assert "update_train_iters(args)" in source(
        "megatron.training.training.get_optimizer_param_scheduler"
    )


@row("megatron.core.rerun_state_machine.RerunStateMachine")
def test_each_result_is_judged_when_it_comes():
    module = "megatron.core.rerun_state_machine"
    assert "RerunStateMachine(*args" in source(f"{module}.initialize_rerun_state_machine")
    assert "result_rejected: bool = rejection_func(result)" in source(
        "RerunStateMachine.validate_result"
    )


LINEAR = "LinearWithGradAccumulationAndAsyncCommunication.backward"


@row("megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda")
def test_a_gradient_is_accumulated_by_this_module():
    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        call = f"fused_weight_gradient_mlp_cuda.{name}(total_input, grad_output, weight.main_grad)"
        assert call in source(LINEAR)


@row("megatron.core.tensor_parallel.layers._grad_accum_fusion_available")
def test_the_fusion_is_refused_without_it():
    refusal = "if config.gradient_accumulation_fusion and (not _grad_accum_fusion_available):"
    assert refusal in source("ColumnParallelLinear.__init__")


ADAM_IS_CHOSEN_IN = "megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups"


@row("megatron.core.optimizer.Adam")
def test_adam_is_taken_from_the_module():
    assert "adam_cls = Adam" in source(
        "megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups"
    )


@row("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER")
def test_pytorchs_adam_is_preferred_by_this():
    assert "if USING_PYTORCH_OPTIMIZER" in source(ADAM_IS_CHOSEN_IN)


@row("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE")
def test_one_step_is_asserted_without_it():
    assert "if not HAVE_APEX_OR_TE" in source("DistributedOptimizer.state_dict")
    assert "len(steps) == 1" in source("DistributedOptimizer.load_state_dict")


@row("megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER")
def test_steps_of_groups_are_saved_with_it():
    assert "USING_TE_OPTIMIZER or USING_APEX_OPTIMIZER" in source("DistributedOptimizer.state_dict")


@row("DistributedOptimizer._set_main_param_and_optimizer_states")
def test_it_writes_in_place_with_autograd():
    method = definition("DistributedOptimizer._set_main_param_and_optimizer_states")
    assert method.decorator_list == []
    assert "dst_tensors[key].copy_(" in ast.unparse(method)


@row("megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue")
def test_the_queue_has_a_server_process():
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue"
    assert "Manager().Queue()" in source(name)


@row("PersistentAsyncCaller.async_loop")
def test_the_writer_divides_by_the_number_of_gpus_and_is_not_ended():
    loop = source("PersistentAsyncCaller.async_loop")
    assert "torch.cuda.set_device(rank % torch.cuda.device_count())" in loop
    assert "item = queue.get()" in loop
    assert "prctl" not in loop


@row("FileSystemWriterAsync.preload_tensors")
def test_tensors_of_the_host_are_not_copied():
    method = source("FileSystemWriterAsync.preload_tensors")
    assert 'tensor.to("cpu", non_blocking=non_blocking)' in method.replace("'", '"')
    assert "clone" not in method


@row("PersistentAsyncCaller.schedule_async_call")
def test_a_dead_writer_is_given_work():
    assert "is_alive" not in source("PersistentAsyncCaller.schedule_async_call")


@row("PersistentAsyncCaller.is_current_async_call_done")
def test_a_dead_writer_is_waited_for():
    method = source("PersistentAsyncCaller.is_current_async_call_done")
    assert "while self.cur_item is None" in method
    assert "_persistent_process" not in method


@row("argparse.ArgumentParser.error")
def test_an_error_shows_the_usage():
    assert "print_usage" in inspect.getsource(argparse.ArgumentParser.error)


@row("argparse.HelpFormatter._expand_help")
def test_some_help_text_cannot_be_formatted():
    parser = megatron_parser()
    formatter = argparse.HelpFormatter("x")

    def fails(action: argparse.Action) -> bool:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return True
        return False

    assert any(fails(action) for action in parser._actions if action.help)


@row("argparse.Action")
def test_some_converter_raises_what_argparse_does_not_expect():
    def fails(convert: Callable) -> bool:
        try:
            convert("nonsense")
        except (argparse.ArgumentTypeError, TypeError, ValueError):
            return False
        except Exception:
            return True
        return False

    converters = {action.type for action in megatron_parser()._actions}
    assert any(fails(each) for each in converters if callable(each) and not isinstance(each, type))


@row("argparse.ArgumentParser.parse_known_args")
def test_the_norms_epsilon_is_not_restored():
    text = source("megatron.training.checkpointing.load_args_from_checkpoint")
    assert "_set_arg('hidden_size')" in text
    assert "norm_epsilon" not in text


@row("torch.compile")
def test_megatron_compiles_on_import():
    jit = importlib.import_module("megatron.core.jit")
    assert "jit_fuser = torch.compile" in Path(jit.__file__).read_text()


# PyTorch on the CPU.


@row("torch.cuda")
def test_megatron_asks_for_a_device_without_looking():
    assert "torch.cuda.current_device()" in source("TransformerLayer.get_layer_static_inputs")
    assert "torch.cuda.Stream()" in source("MoEAlltoAllTokenDispatcher.__init__")


@row("torch.Tensor.is_cuda")
def test_optimizers_take_types_of_cuda():
    text = Path(importlib.import_module("megatron.core.optimizer.optimizer").__file__).read_text()
    assert "torch.cuda.FloatTensor" in text


@row("torch.accelerator.is_available")
def test_data_loaders_ask_for_an_accelerator():
    from torch.utils.data import dataloader

    assert "torch.accelerator.is_available()" in inspect.getsource(dataloader)


@row("megatron.core.extensions.transformer_engine.HAVE_TE")
def test_the_optimizer_is_transformer_engines_unless_its_import_raises_an_import_error():
    text = Path(importlib.import_module("megatron.core.optimizer").__file__).read_text()
    tried = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Try))
    assert "from transformer_engine.pytorch.optimizers import FusedAdam" in ast.unparse(tried.body)
    assert [handler.type.id for handler in tried.handlers] == ["ImportError"]


@row("torch.utils.data.DataLoader")
def test_an_iterator_draws_from_the_default_generator():
    init = inspect.unwrap(DataLoader.__init__)
    loader = DataLoader.__new__(DataLoader)
    init(loader, TensorDataset(torch.zeros(1)))
    before = torch.default_generator.get_state()
    next(iter(loader))
    assert not torch.equal(before, torch.default_generator.get_state())


@row("torch.distributed.all_gather")
def test_tensors_of_unequal_length_are_gathered():
    text = source("megatron.core.tensor_parallel.mappings._gather_along_first_dim")
    assert "torch.distributed.all_gather(output_tensor_list" in text


@row("torch.distributed.reduce_scatter")
def test_tensors_of_unequal_length_are_scattered():
    text = source("megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim")
    assert "torch.distributed.reduce_scatter(output" in text
