"""How fast the links between ranks are: bytes a second and microseconds, inside a node and between nodes.

    python benchmarks/cluster.py 2x2        starts ranks that run this file

Measured through the transport, between two ranks while the others wait: what an exchange can hope for, rather than what
a wire could do. A transfer that is not counted goes ahead of the one that is, as a throttled link lets a burst pass at
full speed when it has rested.
"""

import time
from statistics import median

import torch

from crossdock.comm import Transport

WARM_BYTES, BYTES = 1 << 24, 1 << 26
TRIPS, PINGS = 3, 21

Links = dict[str, dict[str, float]]


def measure_links(transport: Transport, size: int = BYTES) -> Links:
    """{"inside": {...}, "between": {...}}, as far as there are such links; a collective of all ranks.

    From rank 0 to the next rank of its node, and to the first of another. `gbytes_per_s` is of `size` bytes, and `us`
    is half of what one byte takes there and back.
    """
    found = {}
    for name, same in (("inside", True), ("between", False)):
        others = [r for r in range(1, transport.world_size) if transport.topology.same_node(0, r) is same]
        if others:
            found[name] = _between_0_and(others[0], transport, size)
    return found


def _between_0_and(peer: int, transport: Transport, size: int) -> dict[str, float]:
    rest = [rank for rank in range(transport.world_size) if rank not in (0, peer)]
    pair = transport.split([[0, peer], *([rest] if rest else [])])
    measures, times, ping = transport.rank in (0, peer), [], 0.0
    if measures:
        ping = median([_there_and_back(pair, 1) for _ in range(PINGS + 3)][3:])
        _there_and_back(pair, WARM_BYTES)
    for _ in range(TRIPS):  # others wait for one at a time: links may be slow
        took = [round(_there_and_back(pair, size) * 1e9), round(ping * 1e9)] if measures else [0, 0]
        times.append(transport.all_gather(took, "bench links")[0])
    return {"gbytes_per_s": size / median(seconds_ns for seconds_ns, _ in times), "us": times[0][1] / 2e3}


def _there_and_back(pair: Transport, size: int) -> float:
    """Seconds for `size` bytes from rank 0 of the pair to rank 1 and one byte back."""
    sends = pair.rank == 0
    bytes_S1 = torch.ones(size if sends else 0, 1, dtype=torch.uint8)
    answer_S1 = torch.ones(0 if sends else 1, 1, dtype=torch.uint8)
    pair.all_gather([0], "bench links")
    began = time.perf_counter()
    pair.all_to_all_rows(bytes_S1, [0, size * sends], [size * (not sends), 0], "bench links").wait()
    pair.all_to_all_rows(answer_S1, [int(not sends), 0], [0, int(sends)], "bench links").wait()
    return time.perf_counter() - began


def main() -> None:
    """What rank 0 finds, as three lines on stdout."""
    from crossdock.cli.runtime import join_ranks

    with join_ranks("cpu", "auto", 60.0) as runtime:
        links = measure_links(runtime.transport)
        if runtime.group.rank == 0:
            nodes = runtime.group.topology.num_nodes
            print(f"{runtime.group.world_size} ranks on {nodes} nodes, transport {runtime.transport.name}")
            for name, link in links.items():
                print(f"{name:>8} {'a node' if name == 'inside' else 'nodes':6} "
                      f"{link['gbytes_per_s'] * 1e3:8.1f} MB/s {link['us']:8.0f} us")  # fmt: skip


if __name__ == "__main__":
    main()
