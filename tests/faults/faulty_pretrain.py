"""`pretrain_gpt_scmoe.py` on a rank to which something happens: `faulty_pretrain.py FLAGS`.

`$FAULT` names one of the functions below, `$FAULT_RANK` whom it meets (1), `$FAULT_ITERATION` how many
iterations are done by then (5). At the fault the rank prints a line with the time, from which the tests
count. What the rank does afterwards is its own.
"""

import errno
import math
import os
import resource
import signal
import time

RANK = int(os.environ.get("FAULT_RANK", "1"))
DONE = int(os.environ.get("FAULT_ITERATION", "5"))


def say() -> None:
    print(f"FAULT {os.environ['FAULT']} on rank {RANK} at {time.monotonic():.2f}", flush=True)


def killed_in_a_step() -> None:
    in_the_step(lambda: (say(), os.kill(os.getpid(), signal.SIGKILL)))


def hung() -> None:
    """A loop that never ends, as of a data loader that waits for a file system."""

    def wait_for_ever():
        say()
        while True:
            time.sleep(1)

    in_the_step(wait_for_ever)


def stopped() -> None:
    """The whole process, threads and all: what a debugger or a broken host does."""
    in_the_step(lambda: (say(), os.kill(os.getpid(), signal.SIGSTOP)))


def nan() -> None:
    from megatron_scmoe.training import forward_step

    plain = forward_step.loss_function

    def loss_function(loss_mask, output):
        if is_time():
            say()
            output = output * math.nan
        return plain(loss_mask, output)

    forward_step.loss_function = loss_function


def killed_in_a_save() -> None:
    """Its shard is written, and not yet on the disk."""
    plain = os.fsync

    def fsync(file):
        if is_time():
            say()
            os.kill(os.getpid(), signal.SIGKILL)
        plain(file)

    os.fsync = fsync


def killed_in_an_asynchronous_save() -> None:
    """Once the writer has the save, which is made as slow as that of a large model."""
    from megatron.training import checkpointing

    plain = checkpointing.schedule_async_save

    def schedule(request):
        plain(request)
        if is_time():
            say()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointing.schedule_async_save = schedule


def writer_killed() -> None:
    """The process that writes asynchronously, by a kernel without memory."""
    from megatron.core.dist_checkpointing.strategies import async_utils
    from megatron.training import checkpointing

    plain = checkpointing.schedule_async_save

    def schedule(request):
        if is_time():
            say()
            os.kill(async_utils.PersistentAsyncCaller._persistent_process.pid, signal.SIGKILL)
        plain(request)

    checkpointing.schedule_async_save = schedule


def file_size_limited() -> None:
    """A disk that takes no more, for whoever may not mount one."""

    def limit():
        from megatron.core.dist_checkpointing.strategies import async_utils

        say()
        writer = async_utils.PersistentAsyncCaller._persistent_process
        for pid in (0, writer.pid) if writer else (0,):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, 300_000))

    in_the_step(limit)


def tracker_not_written() -> None:
    """The disk is full when the last of a checkpoint's files is written."""
    import builtins

    plain = open

    def open_or_fail(file, mode="r", *args, **kwargs):
        stream = plain(file, mode, *args, **kwargs)
        if str(file).endswith("latest_checkpointed_iteration.txt") and mode == "w" and is_time():
            say()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return stream

    builtins.open = open_or_fail


def clock_an_hour_ahead() -> None:
    plain = time.time
    time.time = lambda: plain() + 3600
    say()


def none() -> None:
    pass


def is_time() -> bool:
    from megatron.training import get_args

    return get_args().curr_iteration >= DONE - 1


def in_the_step(act) -> None:
    """Act as a forward step begins, once."""
    from megatron_scmoe.training import forward_step

    plain, acted = forward_step.get_batch, []

    def get_batch(*args):
        from megatron.training import get_args

        if get_args().curr_iteration >= DONE and not acted:
            acted.append(True)
            act()
        return plain(*args)

    forward_step.get_batch = get_batch


def main() -> None:
    from megatron_scmoe.cli import program

    fault = os.environ.get("FAULT", "none")
    if int(os.environ["RANK"]) == RANK:
        from megatron_scmoe.platform import cpu_backend

        cpu_backend.choose()  # before anything of Megatron is imported
        globals()[fault]()
    program.run("train")


if __name__ == "__main__":
    main()
