"""How everything is timed: contenders take turns, so that a slow moment of the machine hits all; the median counts.

The ceilings are measured in the same run by the same clock: what the device reaches when it only copies, and when it
only multiplies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROUND_S = 0.02  # a round repeats a call until it took about this long
ROUNDS = 9


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches here: gigabytes a second read plus written, and 1e12 operations a second in `dtype`."""

    copy_gbytes_per_s: float
    matmul_tflops: float

    def share(self, operations: float, moved_bytes: float, seconds: float) -> float:
        """The least time the work could take (by the slower of its two bounds) over the time it took."""
        least = max(operations / (self.matmul_tflops * 1e12), moved_bytes / (self.copy_gbytes_per_s * 1e9))
        return least / seconds


def compare(contenders: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each, over ROUNDS rounds in turn after a warm-up."""
    repeats = {}
    for name, call in contenders.items():
        call()
        once = _seconds(call, 1, device)
        repeats[name] = max(1, min(1000, round(ROUND_S / max(once, 1e-7))))
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            rounds[name].append(_seconds(call, repeats[name], device))
    return {name: median(times) for name, times in rounds.items()}


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
    return Ceilings(2 * source.nbytes / copied / 1e9, best / 1e12)


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that compute: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.removeprefix("aten::")
        allocates = name in ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_local_scalar_dense")
        if not is_view and not allocates:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels one call launches: as the profiler sees them on a GPU, as torch dispatches operators on a CPU."""
    call()
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize(device)
        events: Any = profile.events()
        return len([event for event in events if event.device_type.name == "CUDA"])
    with _Launches() as launches:
        call()
    return len(launches.names)
