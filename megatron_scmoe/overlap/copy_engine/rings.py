"""Rings of slots between the ranks of a group, and the copies through them."""

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import mkstemp
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.overlap.copy_engine.blocks import MIN_BLOCK_BYTES, Block, plan

try:
    from cuda.bindings import driver
except ImportError:  # a torch without them; nothing of this can be used then
    driver = None

Memory = Literal["host", "peer"]

RING_BYTES = 192 * 2**20
"""Bytes of all rings that one rank sends into, shared out among its peers."""

SLOTS = 3
"""Slots of a ring: one being filled, one being emptied, one in between."""

_LINE = 64
"""Bytes between two counters: a cache line each."""

_COUNTER = 0xFFFFFFFF
"""Counters are 32 bits wide."""

_ALIGNMENT = 512
"""Of slots, in bytes."""

_HANDLE_BYTES = 64
"""CU_IPC_HANDLE_SIZE of the driver API."""

_SHARED_MEMORY = "/dev/shm"

if driver is not None:
    _SUCCESS = driver.CUresult.CUDA_SUCCESS
    _AT_LEAST = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)


class CopyEngineError(ScMoEConfigError):
    """Copy engines cannot serve this group of ranks.

    Args:
        memory: where the slots were to lie.
        reason: why they cannot.
    """

    def __init__(self, memory: str, reason: str):
        super().__init__(f"--scmoe-exchange copy-{memory}", reason, "collective")


@dataclass
class Ring:
    """The slots between two ranks, seen from one of them; all addresses are the GPU's."""

    slots: list[int]
    produced: int
    consumed: int
    seen: ctypes.c_uint32
    """``consumed`` as the host reads it."""
    blocks: int = 0
    """How many were enqueued here."""

    def next(self) -> tuple[int, int]:
        """The slot of the next block, and how many there were with it."""
        slot = self.slots[self.blocks % SLOTS]
        self.blocks += 1
        return slot, self.blocks


class CopyEngines:
    """Rings and counters between the ranks of one group, all on one host.

    Args:
        group: the expert-parallel group.
        memory: where the slots lie, see the description of the folder (``__init__.py``).

    Raises:
        CopyEngineError: if the group spans hosts, or the driver refuses what this needs.
    """

    def __init__(self, group: ProcessGroup, memory: Memory):
        self.group, self.memory = group, memory
        self.rank, self.size = group.rank(), group.size()
        hosts = len(set(self._gather(self._together(_host_identity))))
        if hosts > 1:
            raise CopyEngineError(memory, f"the expert-parallel group spans {hosts} hosts")
        self.slot_bytes = RING_BYTES // SLOTS // self.size // _ALIGNMENT * _ALIGNMENT
        self._send_stream, self._receive_stream = torch.cuda.Stream(), torch.cuda.Stream()
        self._send = driver.CUstream(self._send_stream.cuda_stream)
        self._receive = driver.CUstream(self._receive_stream.cuda_stream)
        size = SLOTS * self.slot_bytes
        counters = 2 * self.size**2 * _LINE
        if memory == "host":
            self._counters = self._share(counters + self.size**2 * size)
            bases = [
                self._counters + counters + rank * self.size * size for rank in range(self.size)
            ]
        else:
            self._counters = self._share(counters)
            bases = self._share_device_memory(size * self.size)
        # Of the memory at a receiver's base each sender has a part.
        peers = range(self.size)
        self._rings_out = [self._ring(self.rank, peer, bases[peer]) for peer in peers]
        self._rings_in = [self._ring(peer, self.rank, bases[self.rank]) for peer in peers]

    def _ring(self, source: int, target: int, base: int) -> Ring:
        first = base + source * SLOTS * self.slot_bytes
        produced = 2 * (source * self.size + target) * _LINE
        consumed = produced + _LINE
        return Ring(
            [first + slot * self.slot_bytes for slot in range(SLOTS)],
            self._counters + produced,
            self._counters + consumed,
            ctypes.c_uint32.from_address(self._memory.data_ptr() + consumed),
        )

    def exchange(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        input_splits: list[int],
        output_splits: list[int],
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue all-to-alls of rows that begin when the current stream has come this far.

        Args:
            pairs: of a tensor to send, [sum(input_splits), ...], and one to fill,
                [sum(output_splits), ...]; both contiguous and of the same dtype. A block holds
                the same rows of all of them.
            input_splits: rows to each rank.
            output_splits: rows from each rank.

        Returns:
            When all is sent, and when all is received.
        """
        current = torch.cuda.current_stream()
        self._send_stream.wait_stream(current)
        self._receive_stream.wait_stream(current)
        widths = [source.element_size() * prod(source.shape[1:]) for source, _ in pairs]
        row = sum(widths)
        most = (self.slot_bytes - len(pairs) * _ALIGNMENT) // row
        if most < 1:
            raise CopyEngineError(
                self.memory, f"a row of {row} bytes exceeds a slot of {self.slot_bytes}"
            )
        sources = [(source.data_ptr(), width) for (source, _), width in zip(pairs, widths)]
        outputs = [(output.data_ptr(), width) for (_, output), width in zip(pairs, widths)]
        self._keep(sources, outputs, input_splits, output_splits)
        least = max(1, MIN_BLOCK_BYTES // row)
        sends = plan(input_splits, self.rank, least, most, step=1)
        receives = plan(output_splits, self.rank, least, most, step=-1)
        for to_send, to_receive in itertools.zip_longest(sends, receives, fillvalue=()):
            for block in to_send:
                self._send_block(sources, block)
            for block in to_receive:
                self._receive_block(outputs, block)
        return self._send_stream.record_event(), self._receive_stream.record_event()

    def _keep(self, sources, outputs, sent: list[int], received: list[int]) -> None:
        """Copy the rows that stay on this rank."""
        rows = sent[self.rank]
        if rows:
            begin, end = sum(sent[: self.rank]), sum(received[: self.rank])
            for (source, width), (output, _) in zip(sources, outputs, strict=True):
                _copy(output + end * width, source + begin * width, rows * width, self._receive)

    def _send_block(self, sources: list[tuple[int, int]], block: Block) -> None:
        peer, begin, rows = block
        ring = self._rings_out[peer]
        slot, count = ring.next()
        if not _reached(ring.seen.value, count - SLOTS):  # most slots are free when asked for
            _wait(self._send, ring.consumed, count - SLOTS)
        for source, width in sources:
            size = rows * width
            _copy(slot, source + begin * width, size, self._send)
            slot += _aligned(size)
        _write(self._send, ring.produced, count)

    def _receive_block(self, outputs: list[tuple[int, int]], block: Block) -> None:
        peer, begin, rows = block
        ring = self._rings_in[peer]
        slot, count = ring.next()
        _wait(self._receive, ring.produced, count)
        for output, width in outputs:
            size = rows * width
            _copy(output + begin * width, slot, size, self._receive)
            slot += _aligned(size)
        _write(self._receive, ring.consumed, count)

    def _gather(self, value) -> list:
        """The value of every rank."""
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _together(self, step: Callable):
        """What ``step`` gives on this rank, once it has succeeded on all.

        Raises:
            CopyEngineError: on every rank, if it failed on one.
        """
        value, failure = None, ""
        try:
            value = step()
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = str(error) or type(error).__name__
        failures = [failure for failure in self._gather(failure) if failure]
        if failures:
            raise CopyEngineError(self.memory, failures[0])
        return value

    def _share(self, size: int) -> int:
        """The address of ``size`` zeroed bytes of pinned memory that all ranks of the group share."""
        path = self._gather(self._together(lambda: _create(size) if self.rank == 0 else ""))[0]
        try:
            self._memory = self._together(
                lambda: torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
            )
        finally:
            if self.rank == 0:
                os.unlink(path)  # nothing is left behind, however the ranks end
        return self._together(lambda: self._pin(self._memory.data_ptr(), size))

    def _pin(self, address: int, size: int) -> int:
        """The address by which the GPU knows memory of the host, pinned from now on."""
        _call(driver.cuMemHostRegister(address, size, driver.CU_MEMHOSTREGISTER_DEVICEMAP))
        return int(_call(driver.cuMemHostGetDevicePointer(address, 0)))

    def _share_device_memory(self, size: int) -> list[int]:
        """Memory of every rank, ``size`` bytes each, as addresses on this one."""
        own = self._together(lambda: _call(driver.cuMemAlloc(size)))
        handle = self._together(lambda: _call(driver.cuIpcGetMemHandle(own)))
        handles = self._gather(ctypes.string_at(handle.getPtr(), _HANDLE_BYTES))
        return self._together(
            lambda: [
                int(own) if target == self.rank else _open(handle)
                for target, handle in enumerate(handles)
            ]
        )


def _call(result: tuple):
    """The value of a driver call.

    Raises:
        RuntimeError: if it failed.
    """
    if result[0] != _SUCCESS:
        raise RuntimeError(f"copy engines: the CUDA driver returned {result[0].name}")
    return result[1] if len(result) > 1 else None


def _reached(counter: int, value: int) -> bool:
    """Whether a counter is at ``value`` or past it, cyclically, as the GPU's front end compares."""
    return (counter - value) & _COUNTER <= _COUNTER >> 1


def _copy(target: int, source: int, size: int, stream) -> None:
    _call(driver.cuMemcpyAsync(target, source, size, stream))


def _wait(stream, address: int, value: int) -> None:
    _call(driver.cuStreamWaitValue32(stream, address, value & _COUNTER, _AT_LEAST))


def _write(stream, address: int, value: int) -> None:
    _call(driver.cuStreamWriteValue32(stream, address, value & _COUNTER, 0))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _open(handle: bytes) -> int:
    """The address of another rank's device memory."""
    opened = driver.CUipcMemHandle()
    ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
    lazily = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    return int(_call(driver.cuIpcOpenMemHandle(opened, lazily)))


def _host_identity() -> tuple[str, int]:
    """What only processes share that can map the same memory: a booted kernel and its mount.

    Raises:
        RuntimeError: if the driver cannot be called from here at all.
    """
    if driver is None:
        raise RuntimeError("it needs the Python package cuda-bindings")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.stat(_SHARED_MEMORY).st_dev


def _create(size: int) -> str:
    """The path of a new file of ``size`` bytes of shared memory.

    Raises:
        OSError: if there is no room; without asking for it now, the first write beyond what there is
            would end the process.
    """
    file, path = mkstemp(prefix="megatron_scmoe-", dir=_SHARED_MEMORY)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.unlink(path)
        raise OSError(
            f"{size} bytes of {_SHARED_MEMORY}: {error.strerror}; give the container more (--shm-size)"
        ) from error
    finally:
        os.close(file)
    return path
