"""`SymmetricHeap`: memory of every rank that all ranks can write, and a table of where it lies in this process.

On CPUs it is memory without a name (memfd), which the others open through /proc/PID/fd: there is nothing to unlink, so
nothing is left behind however a process ends, and a small /dev/shm, as in containers, does not matter. Rejected: files
in /dev/shm, which outlive a process that is killed before all have opened them, and multiprocessing.shared_memory,
whose resource tracker unlinks what other processes still use. On GPUs it is torch symmetric memory, allocated past
torch's memory pool: an address inside a pool's segment may differ by rank.

Legend: W ranks, B bytes.
"""

import contextlib
import hashlib
import mmap
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from crossdock.comm.torch_dist import TorchTransport
from crossdock.comm.transport import Transport
from crossdock.errors import ConfigError

PAGE = 4096  # bytes that sizes are rounded up to
FIRST = 128  # where boxes begin: nothing stands at byte 0, so that an address of it is a mistake


class SymmetricHeap:
    """Memory of each rank as `rank` sees it: peers[r] is rank r's, uint8 [B], peers[rank] its own.

    bases_W are the addresses of these, int64 on their device.
    """

    def __init__(self, rank: int, peers: list[Tensor], held: object = None) -> None:
        self.rank, self.peers, self.device = rank, peers, peers[rank].device
        self._held = held  # what keeps the others' memory mapped
        self.bases_W = torch.tensor([peer.data_ptr() for peer in peers], dtype=torch.int64, device=self.device)

    @classmethod
    def open(cls, control: Transport, device: torch.device, nbytes: int, phase: str) -> "SymmetricHeap":
        """`nbytes` zeroed bytes on each rank. A collective; all ranks ask for equally many.

        Raises ConfigError, on every rank, where one of them cannot allocate or map.
        """
        make = _on_host if device.type == "cpu" else _on_device
        return cls(control.rank, *make(control, device, -(-nbytes // PAGE) * PAGE, phase))

    def view(self, rank: int, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`shape` values of `dtype` at byte `at` of a rank's memory."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.peers[rank][at : at + count].view(dtype).view(shape)


def _agree(control: Transport, failure: str, phase: str, what: str) -> None:
    """Tells all ranks whether this one failed; raises ConfigError on every rank where any did."""
    failed = [rank for rank, (bad,) in enumerate(control.all_gather([int(bool(failure))], phase)) if bad]
    if failed:
        named = ", ".join(str(control.members[rank]) for rank in failed)
        where = f"rank {control.members[control.rank]}: {phase}"
        raise ConfigError(f"{where}: rank {named} could not {what}" + (f": {failure}" if failure else ""))


def _on_host(control: Transport, device: torch.device, nbytes: int, phase: str) -> tuple[list[Tensor], object]:
    fd, failure = -1, ""
    with contextlib.ExitStack() as held:
        try:
            fd = os.memfd_create("crossdock")
            held.callback(os.close, fd)  # what is mapped stays until the last rank lets go of it
            os.ftruncate(fd, nbytes)
        except OSError as error:
            failure = str(error)
        places = control.all_gather([_machine(), os.getpid(), fd], phase)
        _check_one_machine(control, [machine for machine, *_ in places], phase)
        maps: list[mmap.mmap] = []
        try:
            for _, pid, theirs in places:
                opened = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR) if theirs >= 0 else fd
                try:
                    maps.append(mmap.mmap(opened, nbytes))
                finally:
                    if opened != fd:
                        os.close(opened)
        except (OSError, ValueError) as error:
            failure = failure or str(error)
        _agree(control, failure, phase, f"map {nbytes} bytes of the other ranks' memory")
    return [torch.frombuffer(mapped, dtype=torch.uint8) for mapped in maps], maps


def _machine() -> int:
    """This boot of this machine and this process namespace, as 63 bits."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        named = f"{file.read()}{os.stat('/proc/self/ns/pid').st_ino}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big") >> 1


def _check_one_machine(control: Transport, machines: list[int], phase: str) -> None:
    here = machines[control.rank]
    far = [str(member) for member, machine in zip(control.members, machines, strict=True) if machine != here]
    if far:
        where = f"rank {control.members[control.rank]}: {phase}"
        raise ConfigError(
            f"{where}: on CPUs, transport 'symmetric' reaches ranks of one machine and process namespace, but not rank "
            f"{', '.join(far)}: use transport 'torch', or hierarchy 'node'"
        )


def _on_device(control: Transport, device: torch.device, nbytes: int, phase: str) -> tuple[list[Tensor], object]:
    from torch._C._distributed_c10d import _SymmetricMemory

    mine, failure = None, ""
    try:
        mine = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        mine.zero_()
        torch.cuda.synchronize(device)  # zeroed before another rank can write to it
    except RuntimeError as error:
        failure = str(error).splitlines()[0]
    _agree(control, failure, phase, f"allocate {nbytes} bytes of symmetric memory")
    assert mine is not None
    if not isinstance(control, TorchTransport):
        return [mine], None  # a world of one
    nonce = int.from_bytes(os.urandom(7), "big")
    name = f"crossdock {control.all_gather([nonce], phase)[0][0]:x}"  # torch keeps what it was told of a name for good
    bond = control._group.bonded()

    def meet() -> tuple[Any, str]:
        torch.cuda.set_device(device)  # the current device is a thread's own
        try:
            _SymmetricMemory.set_group_info(name, control.rank, control.world_size, PrefixStore(name, bond.store()))
            return _SymmetricMemory.rendezvous(mine, name), ""
        except RuntimeError as error:
            return None, str(error).splitlines()[0]

    handle, failure = control._channel.run(phase, meet)  # the store's waits know of no failure
    _agree(control, failure, phase, "reach the other ranks' GPU memory, which needs one NVLink domain")
    assert handle is not None
    ranks = range(control.world_size)
    peers = [mine if r == control.rank else handle.get_buffer(r, (nbytes,), torch.uint8) for r in ranks]
    return peers, handle
