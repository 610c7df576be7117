"""A run that would go on with another model, optimizer or schedule is refused by flag."""

import argparse
import copy
import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.arguments import parse_args

from megatron_scmoe import arguments
from megatron_scmoe.arguments import flag_of
from megatron_scmoe.checkpoints.model_arguments import with_defaults
from megatron_scmoe.checkpoints.runtime_settings import settings_of_the_model
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ConversionError, ScMoEConfigError
from megatron_scmoe.platform.megatron_flags import add_run_args
from megatron_scmoe.training import lr_schedule, optimizer_state, pretrain, resuming, saved_run
from megatron_scmoe.training.saved_run import SavedRun
from tests import checkpoints, models

KIND = "pos3, shared norm, CG-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of iteration 7."""
    models.init_parallel()
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints.save(checkpoints.arguments(KIND), path)
    return path


@functools.cache
def _arguments(*flags: str) -> argparse.Namespace:
    return checkpoints.arguments(KIND, *flags)


def arguments_of(*flags: str) -> argparse.Namespace:
    """Arguments of a run of this kind of model, to be changed."""
    return copy.copy(_arguments(*flags))


def run(folder, *flags: str, **changes) -> argparse.Namespace:
    """Arguments of a run of the same model that loads ``folder``, but for flags and values."""
    args = arguments_of(*flags)
    vars(args).update({"load": str(folder), **changes})
    return args


def refusal(folder, *flags: str, **changes) -> str:
    args = run(folder, *flags, **changes)
    with pytest.raises(ScMoEConfigError) as caught:
        resuming.check(args, saved_run.find(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def accept(folder, *flags: str, **changes) -> None:
    args = run(folder, *flags, **changes)
    resuming.check(args, saved_run.find(args))


DIFFERENT = [
    ("--scmoe-tap pos2", "--scmoe-tap pos3"),
    ("--scmoe-combine cg1", "--scmoe-combine cg2"),
    ("--scmoe-router-norm own", "--scmoe-router-norm shared"),
    ("--scmoe-post-norm", "no --scmoe-post-norm"),
    ("--scmoe-zero-experts 2", "--scmoe-zero-experts 0"),
    ("--scmoe-expert-bias sign", "--scmoe-expert-bias none"),
    ("--scmoe-router-bias", "no --scmoe-router-bias"),
    ("--norm-epsilon 0.001", "--norm-epsilon 1e-05"),
    ("--rotary-base 5000", "--rotary-base 10000"),
    ("--rotary-percent 0.5", "--rotary-percent 1.0"),
    ("--rotary-seq-len-interpolation-factor 2", "no --rotary-seq-len-interpolation-factor"),
    ("--use-rope-scaling", "no --use-rope-scaling"),
    ("--moe-router-topk 1", "--moe-router-topk 2"),
    ("--moe-router-score-function sigmoid", "--moe-router-score-function softmax"),
    ("--moe-router-topk-scaling-factor 2.0", "no --moe-router-topk-scaling-factor"),
    ("--moe-router-load-balancing-type sinkhorn", "--moe-router-load-balancing-type aux_loss"),
    ("--window-size (4,0)", "no --window-size"),
    ("--softmax-type off-by-one", "--softmax-type vanilla"),
    ("--use-mup", "no --use-mup"),
    ("--glu-linear-offset 1.0", "--glu-linear-offset 0.0"),
    ("--position-embedding-type none", "--position-embedding-type rope"),
    ("--num-query-groups 4", "--num-query-groups 2"),
]
"""Of all of these Megatron compares none; most change no shape of a tensor."""


@pytest.mark.parametrize("mine, theirs", DIFFERENT, ids=[mine for mine, _ in DIFFERENT])
def test_another_model_is_refused_by_flag_and_both_values(folder, mine, theirs):
    message = refusal(folder, *mine.split())
    assert message.startswith(f"{mine}: {folder}/iter_0000007 was trained with {theirs}; accepted:")
    assert "--use-checkpoint-args" in message
    assert message.endswith(f"--scmoe-changed {mine.split()[0].removeprefix('--')}")


def test_advice_says_where_a_flag_goes(folder):
    args = run(folder, "--scmoe-tap", "pos1", "--norm-epsilon", "1e-6", use_checkpoint_args=True)
    with pytest.raises(ScMoEConfigError) as caught:
        resuming.check(args, saved_run.find(args), "$SCMOE_ARGS with ")
    assert str(caught.value).endswith(
        "; accepted: --norm-epsilon 1e-05, $SCMOE_ARGS with --scmoe-tap pos3; or, for another model on "
        "purpose, $SCMOE_ARGS with --scmoe-changed norm-epsilon scmoe-tap"
    )


def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path):
    """Root may read any mode: a file stands for it whose reading fails."""
    (tmp_path / "latest_checkpointed_iteration.txt").symlink_to("/proc/self/mem")
    with pytest.raises(saved_run.InputError) as caught:
        saved_run.find(run(tmp_path))
    reason = "a file of it: Input/output error; accepted: a folder whose files can be read"
    assert str(caught.value) == f"--load {tmp_path}: {reason}"


def test_a_flag_that_is_left_out_is_named_too(folder):
    args = run(folder, moe_router_pre_softmax=False)
    with pytest.raises(ScMoEConfigError) as caught:
        resuming.check(args, saved_run.find(args))
    assert str(caught.value).startswith("no --moe-router-pre-softmax: ")
    assert "was trained with --moe-router-pre-softmax; accepted" in str(caught.value)


def test_all_differences_are_in_one_line(folder):
    message = refusal(folder, "--scmoe-tap", "pos1", "--norm-epsilon", "1e-6")
    assert message.startswith("--norm-epsilon 1e-06, --scmoe-tap pos1: ")
    assert "--scmoe-changed norm-epsilon scmoe-tap" in message


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--hidden-dropout 0.3 --attention-dropout 0.1",
        "--moe-aux-loss-coeff 0.5 --moe-router-load-balancing-type seq_aux_loss",
        "--no-scmoe-overlap --scmoe-expert-slot 0",
        "--moe-router-dtype fp32",
        "--max-position-embeddings 64",  # with rope
        "--kv-channels 8 --moe-layer-freq ([0]+[1])*2",  # said in another way
        "--yarn-beta-fast 3 --mup-output-mult 2 --q-lora-rank 3",  # not used by this model
        "--scmoe-tap pos2 --rotary-base 5000 --scmoe-changed scmoe-tap rotary-base",
    ],
)
def test_what_another_run_may_change(folder, flags):
    accept(folder, *flags.split())


def test_weights_may_be_of_another_dtype(folder):
    accept(folder, bf16=True, params_dtype=torch.bfloat16)


def test_finetuning_is_compared_alike(folder):
    for way in (dict(finetune=True), dict(load=None, pretrained_checkpoint=str(folder))):
        assert "--scmoe-tap pos2" in refusal(folder, "--scmoe-tap", "pos2", **way)


def test_another_step_is_compared_with_that_step(folder):
    with pytest.raises(saved_run.InputError, match=r"--ckpt-step 3: .*: --ckpt-step 7"):
        saved_run.find(run(folder, ckpt_step=3))
    assert saved_run.find(run(folder, ckpt_step=7)).path.name == "iter_0000007"


def test_a_first_start_is_compared_with_nothing(tmp_path):
    assert saved_run.find(run(tmp_path, save=str(tmp_path))) is None
    assert saved_run.find(run(tmp_path, load=None)) is None


def test_a_first_start_is_one_of_a_job_that_loads_what_it_saves(folder, tmp_path):
    def is_first(load, **changes) -> bool:
        args = run(load, **changes)
        return saved_run.is_first_start(args, saved_run.find(args))

    assert is_first(tmp_path, save=f"{tmp_path}/.")
    assert not is_first(folder, save=str(folder))
    assert not is_first(tmp_path, save=str(tmp_path), pretrained_checkpoint=str(folder))
    assert not is_first(tmp_path, save=str(tmp_path), non_persistent_ckpt_type="local")
    assert not is_first("s3://bucket/run", save="s3://bucket/run")  # Megatron alone looks there


def test_a_checkpoint_may_be_one_that_is_not_persistent(tmp_path):
    """Megatron alone finds those of kind local; of kind global only where there is one."""
    assert saved_run.find(run(tmp_path, non_persistent_ckpt_type="local")) is None
    args = run(tmp_path, non_persistent_ckpt_type="global")
    with pytest.raises(saved_run.InputError, match="there is no checkpoint"):
        saved_run.find(args)
    (tmp_path / "non_persistent").mkdir()
    (tmp_path / "non_persistent" / "latest_checkpointed_iteration.txt").write_text("4")
    assert saved_run.find(args) is None


def test_changing_what_is_no_setting_of_the_model_is_refused(folder):
    message = refusal(folder, "--scmoe-changed", "lr")
    assert message.startswith("--scmoe-changed lr: it is no setting of the model; accepted: flags")


def of(saved: argparse.Namespace, **state) -> SavedRun:
    return SavedRun(
        "--load /run", saved_run.Path("/run/iter_0000007"), {"args": saved, **state}, True
    )


def without(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    return argparse.Namespace(**{n: v for n, v in vars(args).items() if n not in names})


def test_stock_checkpoint_is_refused_with_the_way_to_convert_it():
    args = arguments_of()
    stock = without(args, *(name for name in vars(args) if name.startswith("scmoe_")))
    with pytest.raises(ScMoEConfigError, match="scmoe convert upcycle --input /run") as caught:
        resuming.check(args, of(stock))
    assert "is of a stock Megatron model" in str(caught.value)


def test_files_of_ranks_are_read_without_running_them(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save({"args": arguments_of(), "model": {}}, folder / "model_optim_rng.pt")
    args = run(tmp_path, ckpt_format="torch")
    assert saved_run.find(args).args.scmoe_tap == "pos3"
    torch.save({"args": Evil()}, folder / "model_optim_rng.pt")
    with pytest.raises(ConversionError, match=r"model_optim_rng\.pt is unreadable"):
        saved_run.find(args)


def test_what_megatron_derives_from_other_flags_is_no_difference():
    saved, args = arguments_of(), arguments_of()
    saved.add_bias_linear = args.add_bias_linear = args.add_qkv_bias = True
    saved.add_qkv_bias = False
    assert resuming.differences(args, saved) == {}
    saved.add_bias_linear = args.add_bias_linear = False
    assert resuming.differences(args, saved) == {"add_qkv_bias": False}


def test_fields_that_are_newer_than_the_checkpoint_have_their_defaults():
    older = without(arguments_of(), "scmoe_post_norm", "scmoe_zero_experts", "use_mup")
    resuming.check(arguments_of(), of(older))
    for flag in ("--scmoe-post-norm", "--use-mup"):
        with pytest.raises(ScMoEConfigError, match=f"{flag}: .* was trained with no {flag}"):
            resuming.check(arguments_of(flag), of(older))
    assert with_defaults(older).scmoe_zero_experts == 0


def test_a_model_of_a_later_version_is_refused():
    later = arguments_of()
    later.scmoe_tap = "pos9"
    for reads in (lambda: of(later).args, lambda: with_defaults(later)):
        with pytest.raises(
            ScMoEConfigError, match=r"^a checkpoint of --scmoe-tap pos9: this version "
        ):
            reads()
    later.scmoe_tap, later.scmoe_exchange = "pos3", "later"  # how it computes, no run takes over
    resuming.check(arguments_of(), of(later))


def test_a_setting_of_another_version_is_told_of(capsys):
    later = arguments_of()
    later.scmoe_mixing, later.scmoe_other, later.scmoe_data_identity = 3, False, {"a": "b"}
    pretrain._say_what_is_unknown(of(later), arguments_of())
    told = capsys.readouterr().out
    assert (
        "WARNING: --load /run: another version saved" in told and ", with --scmoe-mixing;" in told
    )


class TestSpecOfAnOlderVersion:
    """It saved ``--spec`` and none of ScMoE's fields."""

    @pytest.fixture
    def older(self):
        args = arguments_of("--spec", "megatron_scmoe.spec", "scmoe_spec")
        return without(args, *(name for name in vars(args) if name.startswith("scmoe_")))

    def test_the_run_s_fields_are_taken_with_a_warning(self, older, monkeypatch, capsys):
        monkeypatch.delenv("SCMOE_ARGS", raising=False)
        resuming.check(arguments_of(), of(older))
        assert "WARNING: --load /run: an older version saved" in capsys.readouterr().out

    def test_the_environment_says_what_it_is(self, older, monkeypatch):
        monkeypatch.setenv("SCMOE_ARGS", "--scmoe-tap pos1")
        assert with_defaults(older).scmoe_tap == "pos1"
        with pytest.raises(ScMoEConfigError, match="--scmoe-tap pos3"):
            resuming.check(arguments_of(), of(older))


def test_use_checkpoint_args_restores_the_model_and_says_what_was_given(folder, monkeypatch):
    words = ["--load", str(folder), "--use-checkpoint-args", "--scmoe-tap", "pos2", "--lr", "0.5"]
    words += ["--norm-epsilon", "1e-3", "--scmoe-changed", "norm-epsilon", "--num-layers", "4"]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_scmoe.py", *words])
    given = parse_args(add_run_args)
    saved = saved_run.find(given)
    chosen = {"eval_iters": 0, "max_position_embeddings": 8}
    add_args, taken = resuming.adding_args(given, chosen, saved)
    assert taken == {"eval_iters": 0}
    args = parse_args(add_args)
    assert (args.scmoe_tap, args.scmoe_combine, args.hidden_size) == ("pos3", "cg2", 32)
    assert args.layernorm_epsilon == 1e-3 and args.lr == 0.5
    assert args.seq_length == saved.args.seq_length
    resuming.check(args, saved)
    lines = resuming.overridden(arguments.given_on_command_line(), args, "so it is")
    assert lines == ["WARNING: --scmoe-tap pos2 was given, and --scmoe-tap pos3 is used: so it is"]


def test_converted_checkpoints_restore_what_they_say(folder):
    args = read_megatron(folder).args
    assert arguments.scmoe_config_from_args(args) == ScMoEConfig(
        tap="pos3", combine="cg2", router_norm="shared"
    )


class TestVocabulary:
    def saved(self, **changes):
        args = arguments_of()  # NullTokenizer of 64 tokens, 96 rows
        vars(args).update(changes)
        return of(args)

    def test_the_same(self):
        resuming.check_vocabulary(arguments_of(), self.saved(), 64)

    def test_another_padding(self, capsys):
        saved = self.saved(tokenizer_type="HuggingFaceTokenizer", vocab_size=None)
        resuming.check_vocabulary(arguments_of(), saved, 90)
        assert capsys.readouterr().out == ""
        args = arguments_of()
        args.padded_vocab_size = 128
        resuming.check_vocabulary(args, saved, 90)
        told = capsys.readouterr().out
        assert told.startswith("WARNING: the embedding has 128 rows, and 96 in /run/iter_0000007: ")

    @pytest.mark.parametrize(
        ("changes", "words", "kept"),
        [
            ({}, {}, True),
            ({"tensor_model_parallel_size": 2}, {}, True),
            ({"tensor_model_parallel_size": 5}, {}, False),  # does not divide 96
            ({"padded_vocab_size": 128}, {"padded_vocab_size": 128}, False),
            ({}, {"make_vocab_size_divisible_by": 32}, True),  # as it was
            ({}, {"make_vocab_size_divisible_by": 64}, False),
            ({"use_checkpoint_args": True}, {}, False),  # it has them
            ({"scmoe_changed": ["tokenizer-model"]}, {}, False),
        ],
    )
    def test_padding_rows_are_kept_on_another_layout(self, changes, words, kept):
        given = arguments_of()
        vars(given).update({"padded_vocab_size": None, **changes})
        saved = self.saved(make_vocab_size_divisible_by=32)
        expected = {"padded_vocab_size": 96} if kept else {}
        assert resuming.rows_to_keep(given, words, saved) == expected

    @pytest.mark.parametrize("tokens", [97, 63])
    def test_another_number_of_tokens_is_refused(self, tokens):
        args = arguments_of()
        with pytest.raises(ScMoEConfigError, match=f"a tokenizer of {tokens} tokens .*of 96 rows"):
            resuming.check_vocabulary(args, self.saved(), tokens)
        args.scmoe_changed = ["tokenizer-type"]
        resuming.check_vocabulary(args, self.saved(), tokens)

    def test_a_much_smaller_one_is_refused(self):
        rows = dict(padded_vocab_size=1024, tokenizer_type="HuggingFaceTokenizer", vocab_size=None)
        with pytest.raises(ScMoEConfigError, match="trained with an embedding of 1024 rows"):
            resuming.check_vocabulary(arguments_of(), self.saved(**rows), 500)


def test_what_a_run_trains_for_is_said_where_it_is_new(capsys):
    before = arguments_of("--moe-aux-loss-coeff", "0.01", "--hidden-dropout", "0.1")
    saved = of(before)
    resuming.say_what_is_trained_for(arguments_of(), saved)  # converted: it was not trained
    before.consumed_train_samples = 8
    for flags in ({}, {"moe_aux_loss_coeff": [0.01]}):
        same = copy.copy(before)
        vars(same).update(flags)
        resuming.say_what_is_trained_for(same, saved)
    resuming.say_what_is_trained_for(arguments_of("--finetune"), saved)
    assert capsys.readouterr().out == ""
    resuming.say_what_is_trained_for(arguments_of(), saved)
    told = capsys.readouterr().out
    assert "--moe-aux-loss-coeff 0.0" in told and told.endswith(
        ": /run/iter_0000007 was trained with --moe-aux-loss-coeff 0.01, --hidden-dropout 0.1 so far\n"
    )


class TestOptimizer:
    def run(self, **changes):
        args = arguments_of()
        args.lr, args.train_iters, args.global_batch_size, args.rank = 0.1, 10, 8, 0
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
        vars(args).update(changes)
        return args

    def saved(self, sharding: str | None = None, kinds=("exp_avg",), **changes):
        scheduler = {n: v for n, (v, _) in lr_schedule._schedule(self.run(**changes)).items()}
        content = {"distrib_optim_sharding_type": sharding} if sharding else {}
        saved = of(
            self.run(use_distributed_optimizer=bool(sharding), **changes),
            opt_param_scheduler=scheduler | {"num_steps": 24},
            content_metadata=content,
        )
        object.__setattr__(saved, "optimizer_states", lambda: set(kinds))
        return saved

    def refusal(self, saved, **changes) -> str:
        args = self.run(**changes)
        with pytest.raises(ScMoEConfigError) as caught:
            optimizer_state.check(args, saved)
            lr_schedule.settle(args, saved)
        return str(caught.value)

    def test_another_length_goes_on_by_the_flags(self, capsys):
        for changes in (dict(train_iters=20), dict(global_batch_size=16), dict(lr_warmup_iters=3)):
            args = self.run(**changes)
            lr_schedule.settle(args, self.saved())
            assert args.override_opt_param_scheduler
        out = capsys.readouterr().out
        assert "decay over 160 samples, not 80" in out and "warmup of 24 samples, not 0" in out

    @pytest.mark.parametrize(("decay", "is_over"), [(3, True), (4, False)])
    def test_a_decay_that_is_over_is_warned_of(self, decay, is_over, capsys):
        lr_schedule.settle(self.run(lr_decay_iters=decay), self.saved())
        warned = "WARNING: that decay is over, as 24 samples are done" in capsys.readouterr().out
        assert warned == is_over

    def test_the_same_schedule_is_left_alone(self, capsys):
        args = self.run()
        lr_schedule.settle(args, self.saved())
        assert not args.override_opt_param_scheduler and capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", ["finetune", "no_load_optim", "override_opt_param_scheduler"])
    def test_what_is_not_loaded_or_chosen_is_not_compared(self, name):
        args = self.run(**{name: True, "lr": 0.3})
        lr_schedule.settle(args, self.saved())

    def test_a_checkpoint_without_a_state(self):
        saved = self.saved(no_save_optim=True)
        told = self.refusal(saved)
        assert told.startswith(
            "--load /run: /run/iter_0000007 has no state of an optimizer (--no-sa"
        )
        for way in ("no_load_optim", "finetune", "skip_train"):
            optimizer_state.check(self.run(**{way: True}), saved)

    def test_a_schedule_that_begins_anew_is_said(self, capsys):
        saved = self.saved()
        saved.state["iteration"] = 7
        lr_schedule.settle(self.run(no_load_optim=True), saved)
        assert "schedule begins anew as well, with its warmup, at iteration 7" in (
            capsys.readouterr().out
        )
        lr_schedule.settle(self.run(no_load_optim=True, finetune=True), saved)
        assert capsys.readouterr().out == ""

    def test_advice_on_weight_decay_is_a_flag(self):
        changes = dict(weight_decay=0.3, start_weight_decay=0.3, end_weight_decay=0.3)
        assert "; accepted: --weight-decay 0.01; " in self.refusal(self.saved(), **changes)
        changes["weight_decay_incr_style"] = "linear"
        saved = self.saved(weight_decay_incr_style="linear")
        assert "; accepted: --start-weight-decay 0.01; " in self.refusal(saved, **changes)
        told = self.refusal(self.saved(), **changes)
        assert "; accepted: --weight-decay-incr-style constant; " in told

    def test_the_last_decay_of_wsd_is_of_this_runs_flags(self, capsys):
        wsd = dict(lr_decay_style="WSD", lr_wsd_decay_iters=2)
        args = self.run(**wsd | dict(lr_wsd_decay_iters=5))
        lr_schedule.settle(args, self.saved(**wsd))
        assert "last decay of 40 samples, not 16" in capsys.readouterr().out
        other = self.run(**wsd)
        lr_schedule.settle(other, self.saved(**wsd))
        assert capsys.readouterr().out == ""
        told = self.refusal(self.saved(**wsd), **wsd, lr_wsd_decay_style="linear")
        assert told.startswith("--lr-wsd-decay-style linear: ") and "style exponential" in told

    def test_where_the_warmup_begins_matters_while_it_lasts(self):
        told = self.refusal(self.saved(lr_warmup_iters=5), lr_warmup_iters=5, lr_warmup_init=1e-3)
        assert told.startswith("--lr-warmup-init 0.001: ")
        lr_schedule.settle(
            self.run(lr_warmup_iters=3, lr_warmup_init=1e-3), self.saved(lr_warmup_iters=3)
        )

    @pytest.mark.parametrize(
        ("length", "kept"),
        [
            (dict(train_iters=10, global_batch_size=5), 3.2),
            (dict(train_iters=None, train_samples=80), 16),
        ],
    )
    def test_what_the_schedule_in_the_checkpoint_leaves_out_is_kept_too(self, length, kept):
        saved = self.saved(lr_decay_style="WSD", lr_wsd_decay_iters=2, lr_warmup_init=1e-3)
        args = self.run(use_checkpoint_opt_param_scheduler=True, **length)
        lr_schedule.settle(args, saved)
        assert args.lr_warmup_init == 1e-3
        assert kept == (
            args.lr_wsd_decay_samples if args.train_samples else args.lr_wsd_decay_iters
        )

    def test_another_learning_rate_is_left_to_the_user(self):
        message = self.refusal(self.saved(), lr=0.2)
        assert message.startswith(
            "--lr 0.2: /run/iter_0000007 was trained with --lr 0.1; accepted:"
        )
        assert "--override-opt-param-scheduler" in message

    def test_another_optimizer_is_refused(self):
        assert self.refusal(self.saved(), optimizer="sgd").startswith("--optimizer sgd: ")

    @pytest.mark.parametrize(
        "size", ["tensor", "pipeline", "expert"], ids=lambda size: f"{size} parallel"
    )
    def test_state_as_it_lay_in_memory_needs_the_same_layout(self, size):
        changes = {f"{size}_model_parallel_size": 2, "use_distributed_optimizer": True}
        message = self.refusal(self.saved("dp_reshardable"), **changes)
        flag = f"--{size}-model-parallel-size"
        assert message.startswith(f"{flag} 2: ") and f"accepted: {flag} 1" in message
        optimizer_state.check(self.run(**changes), self.saved("fully_reshardable"))

    def test_files_of_ranks_need_their_ranks(self):
        saved = SavedRun(
            "--load /run", saved_run.Path("/run/iter_0000007"), {"args": self.run()}, False
        )
        for finetune in (False, True):
            message = self.refusal(saved, tensor_model_parallel_size=2, finetune=finetune)
            assert message.startswith(
                "--tensor-model-parallel-size 2: /run/iter_0000007 has a file"
            )
            assert "--ckpt-convert-format torch_dist" in message

    def files_of_ranks(self, **changes):
        path = saved_run.Path("/run/iter_0000007")
        return SavedRun("--load /run", path, {"args": self.run(**changes)}, False)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("use_distributed_optimizer", True), ("bf16", True), ("decoupled_lr", 0.3)],
    )
    def test_files_of_ranks_hold_the_state_by_number(self, name, value):
        flag = flag_of(name)
        assert self.refusal(self.files_of_ranks(), **{name: value}).startswith(flag)
        assert self.refusal(self.files_of_ranks(**{name: value})).startswith("no " + flag)
        saved = self.files_of_ranks(**{name: value})
        optimizer_state.check(self.run(no_load_optim=True), saved)
        optimizer_state.check(self.run(**{name: value}), saved)

    def test_an_earlier_state_of_the_distributed_optimizer_is_not_loaded(self, tmp_path):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
        args = self.run(use_distributed_optimizer=True)
        state = {"args": args}
        for step in (4, 7, None):
            run = self.run(use_distributed_optimizer=True, ckpt_step=step)
            saved = SavedRun("--load /run", tmp_path / f"iter_000000{step or 7}", state, False)
            if step != 4:
                optimizer_state.check(run, saved)
                continue
            with pytest.raises(
                ScMoEConfigError, match=r"^--ckpt-step 4 with .*accepted: echo 4 > "
            ):
                optimizer_state.check(run, saved)

    def test_random_generators_of_each_replica(self):
        told = self.refusal(self.saved(), data_parallel_random_init=True)
        assert told.startswith("--data-parallel-random-init: ")
        optimizer_state.check(self.run(data_parallel_random_init=True, finetune=True), self.saved())

    def test_plain_and_distributed_are_told_apart(self):
        message = self.refusal(self.saved(), use_distributed_optimizer=True)
        assert message.startswith("--use-distributed-optimizer: ")
        assert self.refusal(self.saved("dp_reshardable")).startswith("no --use-distributed-opt")

    def test_an_optimizer_that_has_not_taken_a_step_has_no_moments(self):
        told = self.refusal(self.saved(kinds=()))
        assert told.startswith("--load /run: /run/iter_0000007 has no exp_avg of adam: the optim")
        assert told.endswith(f"accepted: {optimizer_state._FRESH}")
        optimizer_state.check(self.run(skip_train=True), self.saved(kinds=()))

    def test_a_momentum_cannot_begin_later(self):
        plain = self.saved(kinds=(), optimizer="sgd", sgd_momentum=0.0)
        told = self.refusal(plain, optimizer="sgd", sgd_momentum=0.9)
        assert told.startswith(
            "--sgd-momentum 0.9: /run/iter_0000007 was trained with --sgd-momentum 0.0"
        )
        optimizer_state.check(self.run(optimizer="sgd", sgd_momentum=0.0), plain)
        moving = self.saved(kinds=("momentum_buffer",), optimizer="sgd")
        for momentum in (0.0, 0.9):
            optimizer_state.check(self.run(optimizer="sgd", sgd_momentum=momentum), moving)

    def test_another_dtype_has_no_main_weights(self):
        message = self.refusal(self.saved(), bf16=True)
        assert message.startswith("--bf16: the optimizer's state in /run/iter_0000007 is that of")
        assert "--no-load-optim" in message
        bf16 = self.saved(kinds=("exp_avg", "fp32_param"), bf16=True)
        assert self.refusal(bf16).startswith("fp32: ")
        optimizer_state.check(self.run(fp16=True), bf16)


def test_the_first_step_has_the_weight_decay_of_the_checkpoint():
    def schedule(start: float, end: float, style: str, **keeps):
        optimizer = SimpleNamespace(param_groups=[{}])
        lengths = dict(lr_warmup_steps=0, lr_decay_steps=8, wd_incr_steps=8)
        rates = dict(init_lr=0.0, max_lr=0.1, min_lr=0.0, lr_decay_style="linear")
        decay = dict(start_wd=start, end_wd=end, wd_incr_style=style)
        return OptimizerParamScheduler(optimizer, **lengths, **rates, **decay, **keeps)

    saved, run = schedule(0.0, 0.8, "linear"), schedule(0.5, 0.5, "constant")
    saved.step(4)
    lr_schedule._load_state_dict(run, saved.state_dict())
    assert run.optimizer.param_groups == saved.optimizer.param_groups
    assert run.num_steps == 4


def test_a_setting_of_the_run_under_its_older_name_changes_nothing():
    """Version 0.1.0 saved --scmoe-copied; each run sets anew what is of the run."""
    older = without(arguments_of(), "scmoe_copy_engine_all_to_alls")
    vars(older).update(scmoe_copied=["dispatch"], scmoe_exchange="copy-host", scmoe_chunks=2)
    resuming.check(arguments_of(), of(older))
    loaded = arguments.scmoe_config_from_args(settings_of_the_model(of(older).args))
    assert loaded == arguments.scmoe_config_from_args(arguments_of())
