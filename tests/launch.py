"""Real ranks for tests: N processes that meet over gloo on the loopback and run functions sent to them.

    with Ranks(4) as ranks:
        results = ranks.run(fn, *arguments)        # fn(group, *arguments) on every rank; fn is importable by name

Processes stay up between calls, because starting one costs seconds. An exception comes back with its rank.
"""

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from crossdock.cli.launch import free_port
from crossdock.parallel import EPGroup, init

TIMEOUT_S = 60.0


class RankError(RuntimeError):
    """What ranks raised: `kinds[r]` is the class name on rank r, None where it returned or died."""

    def __init__(self, kinds: dict[int, str], text: str) -> None:
        super().__init__(text)
        self.kinds = kinds


def _serve(rank: int, world_size: int, port: int, timeout_s: float, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    group = init("cpu", TIMEOUT_S)  # that ranks take long to start is no test's concern
    object.__setattr__(group, "timeout_s", timeout_s)
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        fn, arguments = task
        try:
            pipe.send(("done", fn(group, *arguments)))
        except BaseException as error:
            pipe.send(("error", (type(error).__name__, f"{error}\n{traceback.format_exc()}")))
    group.close()


class Ranks:
    """`world_size` processes, each an EPGroup rank; `timeout_s` bounds waits of transports they make."""

    def __init__(self, world_size: int, timeout_s: float = TIMEOUT_S) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.world_size = world_size
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, timeout_s, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        self._collect(60.0)

    def run(self, fn: Callable[..., Any], *arguments: Any) -> list[Any]:
        """fn(group, *arguments) on every rank; the results by rank. Raises RankError where any rank raised."""
        for pipe in self.pipes:
            pipe.send((fn, arguments))
        return self._collect(TIMEOUT_S * 2)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: list[Any] = []
        kinds: dict[int, str] = {}
        texts = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(timeout_s):
                    raise TimeoutError(f"rank {rank} gave no answer within {timeout_s} s")
                what, value = pipe.recv()
            except EOFError:
                what, value = "error", ("Died", "the process ended")
            if what == "error":
                kinds[rank] = value[0]
                texts.append(f"rank {rank}: {value[0]}: {value[1]}")
            results.append(value)
        if kinds:
            raise RankError(kinds, "\n".join(texts))
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(None)
                except OSError:
                    continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def solo(fn: Callable[..., Any], *arguments: Any) -> Any:
    """fn on a group of one, in this process."""
    return fn(EPGroup.solo(), *arguments)
