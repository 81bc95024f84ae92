"""How everything is timed: contenders take turns, so that a slow moment of the machine hits all; the median counts.

On a GPU the clock is that of gpu_clock.py. The ceilings are measured in the same run by the same clock: what the device
reaches when it only copies, and when it only multiplies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from crossdock.cli.bench.gpu_clock import GpuClock, Times, compare_on_gpu
from crossdock.comm import Transport
from crossdock.memory import memory_is_low, return_freed_memory

ROUND_S = 0.02  # a round repeats a call until it took about this long
ROUNDS = 9
RANK_ROUNDS = 6, 200  # fewest and most rounds of calls that several ranks make together


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches here: gigabytes a second read plus written, and 1e12 operations a second in `dtype`.

    `fp8_tflops` is None where the device does not multiply FP8.
    """

    copy_gbytes_per_s: float
    matmul_tflops: float
    fp8_tflops: float | None = None

    def share(self, operations: float, moved_bytes: float, seconds: float, fp8: bool = False) -> float:
        """The least time the work could take (by the slower of its two bounds) over the time it took."""
        tflops = (fp8 and self.fp8_tflops) or self.matmul_tflops
        least = max(operations / (tflops * 1e12), moved_bytes / (self.copy_gbytes_per_s * 1e9))
        return least / seconds


def compare(contenders: dict[str, Callable[[], Any]], device: torch.device, flush: bool = True) -> Times:
    """Median seconds of a call of each, in turn, after a warm-up.

    On a GPU as gpu_clock.py says, `flush` for inputs that come from memory; on a CPU over ROUNDS rounds.
    """
    if device.type == "cuda":
        return compare_on_gpu(contenders, GpuClock(device), flush)
    repeats = {}
    for name, call in contenders.items():
        call()
        once = _seconds(call, 1, device)
        repeats[name] = max(1, min(1000, round(ROUND_S / max(once, 1e-7))))
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            rounds[name].append(_seconds(call, repeats[name], device))
    return Times({name: median(times) for name, times in rounds.items()})


def compare_ranks(
    contenders: dict[str, Callable[[], Any]],
    transport: Transport,
    device: torch.device,
    budget_s: float,
    rounds: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of calls that all ranks make, each from a common start until the last rank is through; in turn, every
    other round from last to first, as it matters what was called before.

    After a first round that is not counted, as many rounds as `budget_s` has time for, or `rounds`. A collective.
    """
    counted = rounds or RANK_ROUNDS[0]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    turn = -1
    while turn < counted:
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            transport.all_gather([0], "bench start")
            synchronize(device)
            began = time.perf_counter()
            contenders[name]()
            synchronize(device)
            took_ns = round((time.perf_counter() - began) * 1e9)
            times[name].append(max(values[0] for values in transport.all_gather([took_ns], "bench end")) / 1e9)
        turn += 1
        if memory_is_low():  # forms leave holes of each other's sizes, and more of them with each round
            return_freed_memory()
        if rounds is None and turn == 0:
            round_s = sum(own[0] for own in times.values())  # the same on all ranks
            counted = min(max(int(budget_s / round_s / 2) * 2, RANK_ROUNDS[0]), RANK_ROUNDS[1])  # of each order as many
    return {name: own[1:] for name, own in times.items()}


def comparable(contenders: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(those that can be called here, why each other cannot): peers differ by device, torch and dtype."""
    able, left_out = {}, {}
    for name, call in contenders.items():
        try:
            call()
            able[name] = call
        except Exception as error:  # a peer may raise what it likes; it is no failure of this run
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return able, left_out


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copies 256 MB (1 GB on a GPU) and multiplies square matrices of two sizes; the best of each counts."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 28 if on_gpu else 1 << 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = compare({"copy": lambda: target.copy_(source)}, device)["copy"]
    best = 0.0
    for size in (4096, 8192) if on_gpu else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2.0 * size**3 / compare({"matmul": lambda a=a, b=b: a @ b}, device)["matmul"])  # type: ignore[misc]
    return Ceilings(2 * source.nbytes / copied / 1e9, best / 1e12, _fp8_tflops(device) if on_gpu else None)


def _fp8_tflops(device: torch.device, size: int = 8192) -> float | None:
    """The vendor's largest product of e4m3 with one scale a tensor."""
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> Any:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    able, _ = comparable({"fp8": multiply})
    return 2.0 * size**3 / compare(able, device)["fp8"] / 1e12 if able else None
