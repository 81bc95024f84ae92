"""How large `bench exchange` makes its experts: as long at work beside the traffic, here, as on a real cluster.

There a rank does at most 704e12 operations a second in bfloat16 (torch's F.grouped_mm on an H200, pytorch#156203)
behind 45e9 bytes a second (a 400 Gb/s adapter each): 15600 operations a byte, and DeepSeek-V3's experts have F = 2048.
A row has 6 * D * F operations and 4 * D bytes there and back, so experts that have f operations a byte behind them take
as long beside their traffic with F = 2048 * f / 15600. Four ranks on two cores with 97e9 operations a second each, and
a link of 94 MB/s for two of them, have 2060: F = 270.

Where half of the rows cross, as between two nodes, products take 6 * 2048 / 704e12 / (4 * 0.5 / 45e9) = 0.39 of the
plain form's time on its link, and about 0.2 in FP8 (1214e12 to 1346e12, DeepGEMM on an H800): `compute_to_plain` in the
result says what they took of all of its time. A GPU is what it is, and has experts of 2048.

Legend: L slots a rank, D hidden, R rows by slot.
"""

from statistics import median
from typing import cast

import torch

from crossdock.cli.bench.links import Links
from crossdock.cli.bench.timing import compare_ranks
from crossdock.comm import DispatchPlan, Inbound, Transport
from crossdock.moe import MoEConfig
from crossdock.moe.experts import Experts

REAL_SIZE, REAL_OPERATIONS_PER_BYTE = 2048, 704e12 / 45e9
STEP = 64  # values; less than a step is left to what else a layer does on the same cores
SLOTS, ROWS, HIDDEN, MEASURED_SIZE, ROUNDS = 8, 256, 2048, 384, 5  # ROWS of each slot


def proportionate_size(operations_per_s: float, bytes_per_s: float) -> int:
    """F for a rank with these, in whole steps; 64 at least and 2048 at most.

    >>> proportionate_size(97e9, 47e6), proportionate_size(704e12, 45e9)
    (256, 2048)
    """
    size = REAL_SIZE * operations_per_s / bytes_per_s / REAL_OPERATIONS_PER_BYTE
    return min(max(round(size) // STEP * STEP, STEP), REAL_SIZE)


def measured_size(transport: Transport, links: Links | None) -> tuple[int, str]:
    """(F, why); a collective. `links` as measured on CPUs, None on a GPU. A node's ranks share a link between nodes."""
    if links is None:
        return REAL_SIZE, "as DeepSeek-V3's"
    topology = transport.topology
    sharers = len(topology.ranks_of_node(topology.node_of_rank[0])) if "between" in links else 1
    link_bytes = links["between" if "between" in links else "inside"]["gbytes_per_s"] * 1e9 / sharers
    operations = products_per_s(transport)
    size = proportionate_size(operations, link_bytes)
    least = ", and this is the least" if size == STEP else ""
    return size, f"{operations / 1e9:.0f}e9 operations/s a rank behind {link_bytes / 1e6:.0f} MB/s{least}"


def products_per_s(transport: Transport) -> float:
    """Operations a second of a rank's experts, while all ranks multiply; a collective."""
    experts = Experts(MoEConfig(HIDDEN, MEASURED_SIZE, SLOTS, 1), SLOTS, torch.bfloat16, torch.device("cpu"))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=HIDDEN**-0.5)
    form, ends_L = experts.packed(), torch.arange(1, SLOTS + 1, dtype=torch.int32) * ROWS
    rows_RD = torch.randn(SLOTS * ROWS, HIDDEN).to(torch.bfloat16)
    inbound = Inbound(rows_RD, ends_L, cast(DispatchPlan, None))  # experts ask for rows and ends only
    calls = {"products": lambda: form(inbound)}
    took = compare_ranks(calls, transport, torch.device("cpu"), 0.0, ROUNDS)["products"]
    return 6.0 * len(rows_RD) * HIDDEN * MEASURED_SIZE / median(took)
