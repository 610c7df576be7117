"""What would stop a run is said before it starts, by the flag's name."""

import argparse
import importlib.util
import shutil
from functools import partial

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.errors import RunError
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.megatron_flags import add_run_args, prepare_parser
from megatron_scmoe.training import run_checks, run_defaults, saving_checks
from megatron_scmoe.training.saved_run import SavedRun

FLAGS = """--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --num-experts 4
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 3
    --tokenizer-type NullTokenizer --vocab-size 64 --moe-aux-loss-coeff 0.01 --mock-data""".split()


def parse(*words: str, world_size: int = 1) -> argparse.Namespace:
    """As a run parses its flags, with what it chooses itself."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    given = prepare_parser(lambda p: run_defaults.leave_open(add_run_args(p)), parser).parse_args(
        words
    )
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parser = prepare_parser(add_run_args, parser)
    parser.set_defaults(**run_defaults.choose(given))
    args = parser.parse_args(words)
    args.world_size, args.rank = world_size, 0
    return args


def without(flag: str) -> list[str]:
    place = FLAGS.index(flag)
    return FLAGS[:place] + FLAGS[place + 2 :]


check = partial(run_checks.check_flags)


@pytest.mark.parametrize("ranks", [1, 2])
def test_flags_that_work(ranks):
    check(parse(*FLAGS, "--expert-model-parallel-size", str(ranks), world_size=ranks))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--rampup-batch-size 2 2 20", "--rampup-batch-size 2 2 20: this Megatron ignores it"),
        (
            "--step-batch-size-schedule 0:2,128:4",
            "--step-batch-size-schedule '0:2,128:4' with --train-iters 3: ",
        ),
        (
            "--step-batch-size-schedule 0:2,8:4,16:8",
            "--step-batch-size-schedule '0:2,8:4,16:8': Megatron cannot read it with --seq-length 32",
        ),
        (
            "--step-batch-size-schedule foo",
            "--step-batch-size-schedule 'foo': Megatron cannot read",
        ),
        (
            "--full-validation",
            "--full-validation: .*; accepted: --multiple-validation-sets with it",
        ),
        (
            "--multiple-validation-sets",
            "--multiple-validation-sets: .*; accepted: --full-validation",
        ),
        ("--tensorboard-log-interval 0", "--tensorboard-log-interval 0: it is too small"),
        ("--save-params-interval 0", "--save-params-interval 0: it is too small"),
        ("--log-progress", "--log-progress: .*; accepted: --save FOLDER with it"),
        ("--finetune", "--finetune: nothing is loaded, .*; accepted: --load FOLDER or --pretr"),
        ("--ckpt-step 3", "--ckpt-step 3: nothing is loaded, .*; accepted: --load FOLDER or --pr"),
        ("--ckpt-step 0 --load x", "--ckpt-step 0: it is too small; accepted: 1 or more"),
        (
            "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
            "--override-opt-param-scheduler with --use-checkpoint-.*; accepted: one of them",
        ),
        ("--skip-train --eval-iters 0", "--skip-train with --eval-iters 0: nothing is left"),
        ("--exit-signal SIGINT", "--exit-signal SIGINT: .*; accepted: --exit-signal-handler"),
        ("--ckpt-convert-format torch", "--ckpt-convert-format torch: there is no --load; "),
        (
            "--ckpt-convert-format torch --load x",
            "--ckpt-convert-format torch: .*; accepted: --ckpt-convert-save FOLDER",
        ),
        ("--ckpt-convert-save x", "--ckpt-convert-save x: nothing is converted"),
        (
            f"--ckpt-convert-format torch --load x --ckpt-convert-save {__file__}",
            f"--ckpt-convert-save {__file__}: it is a file; accepted: a folder",
        ),
        ("--lr -1", "--lr -1.0: it is outside its range; accepted: 0 or more"),
        ("--min-lr 1", "--min-lr 1.0: it is above --lr 0.001; accepted: 0 to 0.001"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0: it is above --lr"),
        ("--adam-beta2 1", "--adam-beta2 1.0: .*; accepted: 0 to below 1"),
        ("--attention-dropout 1.5", "--attention-dropout 1.5: .*; accepted: 0 to below 1"),
        ("--moe-aux-loss-coeff -1", "--moe-aux-loss-coeff -1.0: .*; accepted: 0 or more"),
        ("--moe-z-loss-coeff -1", "--moe-z-loss-coeff -1.0: .*; accepted: 0 or more"),
        ("--moe-input-jitter-eps -0.5", "--moe-input-jitter-eps -0.5: .*; accepted: 0 to below 1"),
        ("--moe-input-jitter-eps 2", "--moe-input-jitter-eps 2.0: .*; accepted: 0 to below 1"),
        ("--kv-channels 0", "--kv-channels 0: it is too small; accepted: 1 or more"),
        *(
            (f"--profile --use-pytorch-profiler --tensorboard-dir x {words}", told)
            for words, told in (
                (
                    "",
                    "--profile-step-end 12: .*; accepted: up to 3, and a smaller --profile-step-s",
                ),
                ("--profile-step-start 1", "--profile-step-end 12: .*; accepted: 2 to 3"),
                (
                    "--profile-step-start 2 --profile-step-end 2",
                    "--profile-step-start 2 --profile-step-end 2: .*; accepted: 0 or more, and a lar",
                ),
                (
                    "--profile-step-start 1 --profile-step-end 2 --profile-ranks 5",
                    "--profile-ranks 5: there is no rank 5; accepted: 0 to 0",
                ),
            )
        ),
        (
            "--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2",
            "--profile --use-pytorch-profiler: .*; accepted: --tensorboard-dir FOLDER with it",
        ),
    ],
)
def test_what_megatron_would_ignore_or_stumble_over(words, told):
    with pytest.raises(RunError, match=f"^{told}"):
        check(parse(*FLAGS, *words.split()))


@pytest.mark.parametrize("flag", ["--save", "--load", "--tensorboard-dir", "--train-data-path"])
def test_a_variable_that_was_never_set(flag):
    """Megatron takes ``--save ""`` for none, and saves nothing."""
    with pytest.raises(RunError, match=f"^{flag} '': it is empty, .*; accepted: a value, or leave"):
        check(parse(*FLAGS, flag, ""))


def test_a_variable_that_is_not_read(monkeypatch, capsys):
    monkeypatch.setenv("SCMOE_ARGS", "")
    check(parse(*FLAGS))
    assert "SCMOE_ARGS" not in capsys.readouterr().out
    monkeypatch.setenv("SCMOE_ARGS", "--scmoe-tap pos3")
    check(parse(*FLAGS))
    assert "WARNING: $SCMOE_ARGS is not read" in capsys.readouterr().out


def test_a_trace_that_is_written_over(tmp_path, capsys):
    flags = "--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2".split()
    flags += ["--tensorboard-dir", str(tmp_path / "second")]
    check(parse(*FLAGS, *flags))
    assert "WARNING" not in capsys.readouterr().out
    (tmp_path / "torch_profile").mkdir()
    (tmp_path / "torch_profile" / "rank-0.json.gz").touch()
    check(parse(*FLAGS, *flags))
    assert f"WARNING: --profile: {tmp_path}/torch_profile has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("begun", "told"), [(10, "3 later there (20 to 40)"), (30, "1 later there (40)"), (40, "")]
)
def test_later_checkpoints_are_told_of(begun, told, tmp_path, capsys):
    for step in (10, 20, 30, 40, 50):
        (tmp_path / f"iter_{step:07d}").mkdir()
        if step < 50:  # the save of the last was cut short
            (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()
    saved = SavedRun("--load x", tmp_path / f"iter_{begun:07d}", {"iteration": begun}, True)
    args = parse(*FLAGS, "--load", str(tmp_path), "--save", str(tmp_path / "."))
    saving_checks.say_what_is_written_over(args, saved)
    assert (told in (out := capsys.readouterr().out)) and bool(out) == bool(told)
    args.save = str(tmp_path / "other")
    saving_checks.say_what_is_written_over(args, saved)
    assert capsys.readouterr().out == ""


def test_checkpoints_of_another_run_are_told_of(tmp_path, capsys):
    save = ["--save", str(tmp_path), "--save-interval", "1"]
    check(parse(*FLAGS, *save))
    assert "WARNING" not in capsys.readouterr().out
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    check(parse(*FLAGS, *save, "--load", str(tmp_path / ".")))
    assert "WARNING" not in capsys.readouterr().out
    check(parse(*FLAGS, *save, "--load", str(tmp_path), "--finetune"))
    assert "WARNING: --save" in capsys.readouterr().out  # it begins at iteration 0
    check(parse(*FLAGS, *save))
    told = capsys.readouterr().out
    assert told.startswith(
        f"WARNING: --save {tmp_path}: it has checkpoints, the last of iteration 7,"
    )


def test_whole_validation_sets_need_some():
    data = [word for word in FLAGS if word != "--mock-data"] + [
        "--data-path",
        "a",
        "--split",
        "1,0,0",
    ]
    whole = ["--full-validation", "--multiple-validation-sets"]
    with pytest.raises(RunError, match=r"^--full-validation: there is no validation data"):
        check(parse(*data, *whole))
    check(parse(*FLAGS, *whole))


def test_a_batch_that_grows():
    words = FLAGS.copy()
    place = words.index("--train-iters")
    words[place : place + 2] = ["--train-samples", "40"]
    check(parse(*words, "--step-batch-size-schedule", "0:2 128:4"))


@pytest.mark.parametrize("part", ["decay", "warmup"])
def test_a_schedule_counts_as_the_run_does(part):
    with pytest.raises(RunError, match=f"^--lr-{part}-samples 2: .*accepted: --lr-{part}-iters N$"):
        check(parse(*FLAGS, f"--lr-{part}-samples", "2"))
    words = [*without("--train-iters"), "--train-samples", "40", f"--lr-{part}-iters", "2"]
    with pytest.raises(RunError, match=f"^--lr-{part}-iters 2: .*accepted: --lr-{part}-samples N$"):
        check(parse(*words))


def test_a_batch_may_be_decreased():
    check(parse(*FLAGS, "--global-batch-size", "3", "--decrease-batch-size-if-needed"))


@pytest.mark.parametrize(
    ("flag", "more", "accepted"),
    [
        ("--save-tokens-per-expert-interval 5", "", "--transformer-impl transformer_engine"),
        ("--save-tokens-per-expert-interval 5", "--moe-grouped-gemm", "--transformer-impl trans"),
        ("--save-dgrads-interval 5", "", "--cross-entropy-loss-fusion"),
        ("--save-dgrads-interval 5", "--cross-entropy-loss-fusion", "--cross-entropy-loss-fusion"),
    ],
)
def test_recordings_that_would_stay_empty_or_end_the_run(flag, more, accepted):
    with pytest.raises(RunError, match=f"^{flag}: .*; accepted: {accepted}"):
        run_checks.check_recordings(parse(*FLAGS, *flag.split(), *more.split()))


def test_other_recordings():
    te = "--transformer-impl transformer_engine --moe-grouped-gemm --cross-entropy-loss-fusion"
    recorded = "--save-tokens-per-expert-interval 5 --save-dgrads-interval 5".split()
    run_checks.check_recordings(
        parse(*FLAGS, *te.split(), "--cross-entropy-fusion-impl", "te", *recorded)
    )
    run_checks.check_recordings(parse(*FLAGS, "--save-activations-interval", "5"))


@pytest.mark.parametrize(
    "flag",
    "--num-layers --hidden-size --num-attention-heads --seq-length --micro-batch-size --lr".split(),
)
def test_flags_that_are_needed(flag):
    with pytest.raises(RunError, match=f"^{flag} is not given: a run needs it; accepted"):
        check(parse(*without(flag)))


def test_all_that_is_missing_is_named_at_once():
    words = "--num-layers 2 --hidden-size 32 --seq-length 32 --micro-batch-size 2 --skip-train"
    with pytest.raises(RunError) as info:
        check(parse(*words.split()))
    assert str(info.value).startswith(
        "--num-attention-heads, --num-experts, --tokenizer-type, --data-path (or --mock-data) are not "
        "given: a run needs them; accepted: all of them"
    )


@pytest.mark.parametrize(
    ("words", "is_warned"),
    [
        ("--moe-aux-loss-coeff 0", True),
        ("--moe-aux-loss-coeff 0 0 --moe-router-load-balancing-type aux_loss seq_aux_loss", True),
        (
            "--moe-aux-loss-coeff 0 0.1 --moe-router-load-balancing-type aux_loss seq_aux_loss",
            False,
        ),
        ("--moe-aux-loss-coeff 0 --moe-router-load-balancing-type sinkhorn", False),
        ("--moe-aux-loss-coeff 0 --scmoe-expert-bias sign", False),
        ("--moe-aux-loss-coeff 0 --num-experts 1", False),
        ("--moe-aux-loss-coeff 0 --skip-train", False),
    ],
)
def test_experts_whose_load_nothing_balances(words, is_warned, capsys):
    check(parse(*FLAGS, *words.split()))
    warned = "WARNING: --moe-aux-loss-coeff 0.0: nothing balances" in capsys.readouterr().out
    assert warned == is_warned


def test_a_checkpoint_may_bring_the_model():
    check(parse(*without("--num-layers")), has_model=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--expert-model-parallel-size 3", "--num-experts is 4.*accepted: 1 or 2 or 4"),
        ("--expert-model-parallel-size 4", "1 rank cannot be divided into groups of 4"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size 2 x .* groups of 2"),
        ("--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2 x .* groups of 2"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: it counts ranks"),
        ("--global-batch-size 3", "--global-batch-size 3: .*accepted: a multiple of 2"),
        (
            "--global-batch-size 1 --decrease-batch-size-if-needed",
            "--global-batch-size 1: .*accepted: a multiple of 2",
        ),
        ("--eval-interval 0", "--eval-interval 0: it is too small; accepted: 1 or more"),
        ("--log-interval 0", "--log-interval 0"),
        ("--eval-iters -1", "--eval-iters -1"),
        ("--seed 0", "--seed 0"),
        ("--save x --save-interval 0", "--save-interval 0"),
        ("--exit-interval 0", "--exit-interval 0"),
        ("--save-interval 2", "--save-interval 2: nothing is saved; accepted: --save FOLDER"),
        ("--async-save", "--async-save: nothing is saved"),
        ("--non-persistent-save-interval 2", "--non-persistent-ckpt-type global"),
        ("--train-samples 9", "--train-iters 3 with --train-samples 9"),
        ("--lr-warmup-iters 3", "--lr-warmup-iters 3: .*accepted: 0 to 2"),
        ("--lr-decay-iters 5 --lr-warmup-iters 6", "--lr-warmup-iters 6: .*accepted: 0 to 4"),
        ("--lr-warmup-fraction 1.0", "--lr-warmup-fraction 1.0"),
        ("--decoupled-lr 0.001", "--decoupled-lr 0.001: it is --lr, by which "),
        ("--decoupled-lr 1e-3 --min-lr 1e-4 --decoupled-min-lr 1e-4", "--decoupled-lr 0.001: "),
        ("--decoupled-min-lr 0.001", "--decoupled-min-lr 0.001: it bounds --decoupled-lr, which "),
        ("--lr-decay-iters 0", "--lr-decay-iters 0"),
        (
            "--lr-decay-style WSD",
            "--lr-decay-style WSD: .*accepted: --lr-wsd-decay-iters N with it",
        ),
        ("--lr-wsd-decay-iters 2", "--lr-wsd-decay-iters 2: --lr-decay-style linear has no such "),
        (
            "--lr-wsd-decay-samples 2",
            "--lr-wsd-decay-samples 2: .*accepted: --lr-wsd-decay-iters N",
        ),
        (
            "--phase-transition-iterations 2",
            "accepted: --train-samples N in place of --train-iters",
        ),
        ("--log-timers-to-tensorboard", "--tensorboard-dir FOLDER with it"),
        ("--bf16 --fp16", "^--bf16 with --fp16: .*accepted: one of them"),
        ("--distributed-timeout-minutes 0", "--distributed-timeout-minutes 0: it is too small"),
        ("--save x --async-save --ckpt-format torch", "^--async-save with --ckpt-format torch: "),
        (
            "--save x --save-interval 2 --save-retain-interval 3",
            "^--save-retain-interval 3: .*; accepted: a multiple of --save-interval 2$",
        ),
        ("--save x --save-retain-interval 0", "--save-retain-interval 0"),
        ("--train-iters 0", "accepted: 1 or more, or --skip-train to evaluate alone"),
        (
            "--train-iters -1 --skip-train",
            "--train-iters -1: it is too small; accepted: 0 or more$",
        ),
        ("--checkpoint-activations", "accepted: --recompute-activations"),
        ("--dataloader-defer-npy-index-mmap", "accepted: --data-cache-path FOLDER with it"),
    ],
)
def test_refusals(words, told):
    with pytest.raises(RunError, match=told) as refused:
        check(parse(*FLAGS, *words.split()))
    assert "\n" not in str(refused.value)
    assert "; accepted: " in str(refused.value)


def test_a_run_needs_its_length():
    words = without("--train-iters")
    for also in ((), ("--full-validation",)):
        with pytest.raises(RunError, match="neither --train-iters nor --train-samples"):
            check(parse(*words, *also))
    with pytest.raises(RunError, match=r"--train-samples 3: .* takes 4; accepted: 4 or"):
        check(parse(*words, "--train-samples", "3"))
    check(parse(*words, "--train-samples", "4"))


def test_a_run_that_only_evaluates_needs_none():
    args = parse(*without("--train-iters"), "--skip-train")
    assert args.train_iters == 0
    check(args)
    check(parse(*FLAGS, "--skip-train", "--train-iters", "0"))


@pytest.mark.skipif(not cpu_backend.is_enabled(), reason="of the CPU")
@pytest.mark.parametrize(
    "words",
    [
        "--moe-grouped-gemm",
        "--tensorboard-dir x --log-memory-to-tensorboard",
        "--distributed-backend nccl",
        "--save x --async-save --async-strategy nvrx",
        "--transformer-impl transformer_engine",
        "--fp8-format hybrid",
        "--profile",
        "--record-memory-history",
        "--optimizer-cuda-graph",
        "--moe-latent-size 16",
    ],
)
def test_what_needs_a_gpu(words):
    flag = words.split()[-2 if words.split()[-1][0] != "-" else -1]
    with pytest.raises(RunError, match=f"^{flag}"):
        check(parse(*FLAGS, *words.split()))


def test_nobody_watches_ranks_that_torchrun_started(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    with pytest.raises(RunError, match="accepted: ft_launcher in place of torchrun"):
        check(parse(*FLAGS, "--enable-ft-package", "--save", "x"))
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "socket")
    check(parse(*FLAGS, "--enable-ft-package", "--save", "x"))


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("--wandb-project p --wandb-exp-name e --save x", "wandb"),
        ("--optimizer muon", "emerging_optimizers"),
        ("--enable-ft-package", "nvidia_resiliency_ext"),
        ("--adlr-autoresume", "userlib"),
        ("--non-persistent-ckpt-type local", "nvidia_resiliency_ext"),
        ("--save x --async-save --async-strategy nvrx", "nvidia_resiliency_ext"),
    ],
)
def test_packages(words, package, monkeypatch):
    find = importlib.util.find_spec
    absent = {package}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(RunError, match=f"the Python package {package} is not installed"):
        check(parse(*FLAGS, *words.split()))


class TestValidationData:
    data = FLAGS[:-1]

    @pytest.mark.parametrize(
        "words",
        [
            "--train-data-path d",
            "--data-path d --split 1,0,0",
            "--data-path d --split 100",
            "--data-path d --split 9,0.00,1",
            "--data-path d --split 9/0/1",
        ],
    )
    def test_without_any_nothing_is_evaluated(self, words):
        args = parse(*self.data, *words.split())
        assert args.eval_iters == 0
        check(args)
        with pytest.raises(RunError, match="--eval-iters 5: there is no validation data"):
            check(parse(*self.data, *words.split(), "--eval-iters", "5"))

    @pytest.mark.parametrize(
        "words",
        [
            "--train-data-path d --valid-data-path e",
            "--data-path d",
            "--data-path d --split 8,2",
            "--data-path d --split 90/10/0",
            "--data-path d --split 90:.5",
        ],
    )
    def test_with_some_the_default_stands(self, words):
        args = parse(*self.data, *words.split())
        assert args.eval_iters == 100
        check(args)


class TestDisk:
    def args(self, folder, **kwargs):
        args = parse(*FLAGS, "--save", str(folder), "--swiglu", "--vocab-size", "128")
        defaults = dict(
            params_dtype=torch.float32,
            padded_vocab_size=128,
            ffn_hidden_size=64,
            kv_channels=16,
            num_query_groups=2,
            data_parallel_size=1,
            moe_layer_freq=[0, 1],
            moe_ffn_hidden_size=32,
            moe_shared_expert_intermediate_size=32,
            expert_tensor_parallel_size=1,
            untie_embeddings_and_output_weights=True,
        )
        vars(args).update(defaults | kwargs)
        return args

    def free(self, monkeypatch, size):
        usage = shutil.disk_usage("/")._replace(free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def test_size_is_that_of_weights_and_moments(self, tmp_path):
        whole = saving_checks.checkpoint_bytes(self.args(tmp_path))
        parameters = whole / 12
        hidden, vocab = 32, 128
        least = 2 * vocab * hidden + (4 + 1) * 3 * hidden * 32 + 3 * hidden * 64
        assert least < parameters < 2 * least
        weights = saving_checks.checkpoint_bytes(self.args(tmp_path, no_save_optim=True))
        assert weights == pytest.approx(whole / 3)
        half = saving_checks.checkpoint_bytes(self.args(tmp_path, params_dtype=torch.bfloat16))
        assert half == pytest.approx(whole / 12 * 14)

    def test_a_disk_too_small_for_one(self, tmp_path, monkeypatch):
        args = self.args(tmp_path / "not" / "yet")
        self.free(monkeypatch, saving_checks.checkpoint_bytes(args) - 1)
        told = f"^--save {args.save}: a checkpoint has about .* are free; accepted: a folder on another"
        with pytest.raises(RunError, match=told):
            saving_checks.check_disk(args)

    def test_a_disk_too_small_for_all_is_a_warning(self, tmp_path, monkeypatch, capsys):
        args = self.args(tmp_path, save_interval=1)
        self.free(monkeypatch, 2.5 * saving_checks.checkpoint_bytes(args))
        saving_checks.check_disk(args)
        assert capsys.readouterr().out.startswith(f"WARNING: --save {tmp_path}: 3 checkpoints of")
        self.free(monkeypatch, 3 * saving_checks.checkpoint_bytes(args))
        saving_checks.check_disk(args)
        assert capsys.readouterr().out == ""


def test_what_is_lost_is_said(capsys):
    check(parse(*FLAGS, "--exit-signal-handler"))
    assert capsys.readouterr().out.startswith("WARNING: --exit-signal-handler without --save")
