"""How many chunks a call is divided into, and in how many portions the first one comes: a cost model, corrected by
what earlier calls took.

More chunks hide more of the traffic, and cost more: each is an exchange and a pass over the experts' weights. The model
plays the order of events of `crossdock.moe.pipeline` on one link and one processor, for each number of chunks, with
rates that are typical for the device and, on a CPU, factors of measured over predicted time. There the processor moves
rows, too, and products hide nothing of that: what it worked while rows travelled is no time of the link, and where
ranks share cores it takes as much longer as products do. The factors and the number of tokens are gathered at each
call, and the worst of each is taken, so that all ranks choose the same number.

Rejected: a probe when the layer is built. Links that are throttled let a short burst through at full rate, so a probe
short enough to go unnoticed measures something else. Rejected: fitting fixed costs and rates at once. One call
has too few sizes to tell them apart. On a GPU the host does not wait and has nothing to measure: assumed rates stay.

Legend: T tokens, K experts per token, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from crossdock.comm import Codec
from crossdock.comm.legs import CUTS
from crossdock.comm.transport import Transport
from crossdock.moe.config import MoEConfig

CANDIDATES = (1, 2, 3, 4, 6, 8)  # of the traffic two leave half in sight, three a quarter, four a sixth
WORTH = 0.97  # more chunks must save this much: fewer rows a product are slower in ways the model does not know
PASSES = 8  # over the weights, which products of near rows must take at least, to be made while far rows are under way
UNIT = 1_000_000  # factors are gathered as integers
SHORT = 0.1  # of the time since rows were sent
DRIFT = 0.1  # of the way, a call
MOST = 1e4  # times faster or slower than assumed
MOST_CROWDED = 8.0  # ranks on a core


@dataclass(frozen=True)
class Rates:
    """Seconds: of an exchange of no rows, of a byte, of a pass over the experts without rows, of a weight's byte, of an
    operation (a multiplication or an addition); of the processor, to send no rows, and for a byte of their values."""

    exchange_s: float
    byte_s: float
    pass_s: float
    weight_byte_s: float
    operation_s: float
    handling_s: float = 0.0
    handled_byte_s: float = 0.0

    def scaled(
        self, exchange: float = 1.0, products: float = 1.0, handling: float = 1.0, passes: float = 1.0
    ) -> "Rates":
        """With bytes, operations, handling and passes over the weights slower by these factors."""
        return replace(
            self,
            byte_s=self.byte_s * exchange,
            pass_s=self.pass_s * passes,
            weight_byte_s=self.weight_byte_s * passes,
            operation_s=self.operation_s * products,
            handling_s=self.handling_s * handling,
            handled_byte_s=self.handled_byte_s * handling,
        )


CPU = Rates(exchange_s=5e-4, byte_s=1e-9, pass_s=1e-4, weight_byte_s=1e-10, operation_s=2e-11,
            handling_s=2e-3, handled_byte_s=5e-10)  # fmt: skip
NVLINK = Rates(exchange_s=5e-5, byte_s=1 / 150e9, pass_s=3e-5, weight_byte_s=1 / 3e12, operation_s=1 / 400e12)
NETWORK = replace(NVLINK, exchange_s=1e-4, byte_s=1 / 45e9)  # as published for 16 to 64 H800 with 400 Gbit/s each


@dataclass(frozen=True)
class Work:
    """What a layer's rows cost: K, bytes of a row on its way there and back, operations a row, bytes of weights."""

    top_k: int
    row_bytes: int
    back_bytes: int
    row_operations: int
    weight_bytes: int

    @classmethod
    def of(cls, config: MoEConfig, dtype: torch.dtype, slots: int, codec: Codec | None) -> "Work":
        """Of a layer with that many slots on each rank."""
        back_bytes = config.hidden_size * dtype.itemsize
        row_bytes = back_bytes if codec is None else codec.row_bytes(config.hidden_size)
        values = 3 * config.hidden_size * config.expert_size
        held = dtype.itemsize if config.quant.kind == "none" else 1
        return cls(config.top_k, row_bytes, back_bytes, 2 * values, values * slots * held)


def products_s(rates: Rates, work: Work, rows: float) -> float:
    """One pass of `rows` rows through the experts of a rank."""
    return rates.pass_s + rates.weight_byte_s * work.weight_bytes + rates.operation_s * work.row_operations * rows


def exchange_s(rates: Rates, row_bytes: int, rows: float, world_size: int) -> float:
    """`rows` rows of a rank to all ranks, one in W of which stays."""
    return rates.exchange_s + rates.byte_s * row_bytes * rows * (world_size - 1) / world_size


def handling_s(rates: Rates, work: Work, rows: float) -> float:
    """What the processor does to send `rows` rows of a rank, and to receive as many: it grows with their values,
    however few bytes these are on the wire."""
    return rates.handling_s + rates.handled_byte_s * work.back_bytes * rows


def predicted_s(rates: Rates, work: Work, shares: list[float], tokens: int, world_size: int) -> float:
    """How long a layer takes whose tokens are divided into `shares`, which add up to 1; shared experts left out."""
    rows = [tokens * work.top_k * share for share in shares]
    link = computed = 0.0
    arrived: list[float] = []

    def travel(chunk: int, row_bytes: int) -> float:
        nonlocal link
        link = max(link, computed) + exchange_s(rates, row_bytes, rows[chunk], world_size)
        return link

    for chunk in range(len(rows)):
        while len(arrived) < min(chunk + 2, len(rows)):
            arrived.append(travel(len(arrived), work.row_bytes))
        handled = 2 * handling_s(rates, work, rows[chunk])
        computed = max(computed, arrived[chunk]) + handled + products_s(rates, work, rows[chunk])
        returned = travel(chunk, work.back_bytes)
    return returned


def chunk_shares(chunks: int) -> list[float]:
    """Parts of the tokens in each chunk: the first and the last are half as large as the others."""
    if chunks == 1:
        return [1.0]
    half = 1 / (2 * chunks - 2)
    return [half] + [2 * half] * (chunks - 2) + [half]


def best_chunks(rates: Rates, work: Work, tokens: int, world_size: int) -> int:
    """The number of chunks that takes least time; the fewer where more are hardly worth it."""
    best = CANDIDATES[0]
    least_s = predicted_s(rates, work, chunk_shares(best), tokens, world_size)
    for chunks in CANDIDATES[1:]:
        took_s = predicted_s(rates, work, chunk_shares(chunks), tokens, world_size)
        if took_s < WORTH * least_s:
            best, least_s = chunks, took_s
    return best


def amid_s(rates: Rates, work: Work, tokens: int, world_size: int, nodes: int) -> float:
    """The same in one chunk whose rows from other nodes are computed amid those from this one, in four parts."""
    rows = tokens * work.top_k
    near_s, far_s = products_s(rates, work, rows / nodes), products_s(rates, work, rows - rows / nodes)
    near_s += len(CUTS[5]) * rates.pass_s
    first, _, third = CUTS[5]  # what hides rows crossing, and behind which results cross
    there_s, back_s = (exchange_s(rates, size, rows, world_size) for size in (work.row_bytes, work.back_bytes))
    seen_s = max(there_s, first * near_s) + max(back_s, (1 - third) * near_s)
    return seen_s + (third - first) * near_s + far_s + 2 * handling_s(rates, work, rows)


@dataclass
class Factor:
    """What something has taken over what was predicted: half the way to the newest, all of it to the first."""

    value: float = 1.0
    is_known: bool = False

    def towards(self, ratio: float) -> None:
        ratio = min(max(ratio, 1 / MOST), MOST)
        self.value = (self.value + ratio) / 2 if self.is_known else ratio
        self.is_known = True

    def or_else(self, other: "Factor") -> float:
        return self.value if self.is_known else other.value

    def drift(self, other: "Factor") -> None:
        """Some of the way down to another that has just been measured."""
        self.value -= DRIFT * max(self.value - other.value, 0.0)


@dataclass(frozen=True)
class Travel:
    """Of rows under way: links, and what the processor does."""

    exchange: Factor = field(default_factory=Factor)
    handling: Factor = field(default_factory=Factor)


class Pace:
    """What one layer's exchanges and products have taken on this rank, over what was predicted.

    `nodes`: 1 where rows do not travel in two legs. `chosen` is the last call's number of chunks, and `portions` those
    of `comm.legs` in which the first one came. Of five, the host waits for some while others are computed: on a
    GPU it would be streams that wait, which has not been measured, and they are not chosen.

    Rows in chunks and rows amid others have factors of their own, the other's until they have travelled: what is
    measured is the first chunk's way over both legs, or all rows' over the slow one. With factors in common, a call in
    chunks made five portions look as slow as it had been itself. What is not chosen drifts down to what is, so that one
    slow call does not keep it from being tried again.
    """

    def __init__(self, transport: Transport, work: Work, device: torch.device, nodes: int = 1) -> None:
        self.transport, self.work, self.nodes = transport, work, nodes
        self.measures = device.type == "cpu"
        self.rates = CPU if self.measures else NVLINK if transport.topology.num_nodes == 1 else NETWORK
        self.in_chunks, self.amid = Travel(), Travel()
        self.products, self.passes, self.crowding = Factor(), Factor(), Factor()
        self.chosen = self.portions = 1

    def choose(self, tokens: int, whole: bool) -> tuple[int, int]:
        """The number of chunks, and of portions of the first one, for a call with so many tokens here.

        A collective, the same on every rank. `whole`: no portions, as where gradients are asked for.
        """
        factors = [self.products.value, self.passes.value]
        for travel, other in ((self.in_chunks, self.amid), (self.amid, self.in_chunks)):
            factors.append(travel.exchange.or_else(other.exchange))
            factors.append(travel.handling.or_else(other.handling) * self.crowding.value)
        values = [tokens, int(whole), *(round(factor * UNIT) for factor in factors)]
        gathered = self.transport.all_gather(values, "choice of chunks")
        most, is_whole, *worst = (max(values) for values in zip(*gathered, strict=True))
        products, passes, exchange, handling, amid_exchange, amid_handling = (factor / UNIT for factor in worst)
        rates = self.rates.scaled(exchange, products, handling, passes)
        world_size = self.transport.world_size
        self.chosen = best_chunks(rates, self.work, most, world_size)
        self.portions = 1
        if not is_whole and self.nodes > 1:
            amid_rates = self.rates.scaled(amid_exchange, products, amid_handling, passes)
            self.portions = self._best_portions(rates, amid_rates, most, world_size)
        self.chosen = 1 if self.portions == 5 else self.chosen
        return self.chosen, self.portions

    def _best_portions(self, rates: Rates, amid_rates: Rates, tokens: int, world_size: int) -> int:
        """Of the first of `chosen` chunks, or of the only one in the place of these."""
        chunks_s = predicted_s(rates, self.work, chunk_shares(self.chosen), tokens, world_size)
        if self.measures and amid_s(amid_rates, self.work, tokens, world_size, self.nodes) < chunks_s:
            return 5
        near_rows = tokens * self.work.top_k * chunk_shares(self.chosen)[0] / self.nodes
        is_worth_it = products_s(rates, self.work, near_rows) >= (1 + PASSES) * products_s(rates, self.work, 0)
        return 2 if self.chosen > 1 and is_worth_it else 1

    def saw_exchange(
        self, sent: Sequence[int], took_s: float, waited_s: float, worked_s: float, portions: int = 1
    ) -> None:
        """Rows that this rank sent in each exchange, the first of which has arrived, in so many portions; where the
        wait was short, that may have been long ago.

        worked_s: of this process meanwhile, on any core, without products.
        """
        rows = sent[0]
        if not self.measures or not rows:  # without rows of its own a rank has those of others to receive
            return
        travel, other = (self.amid, self.in_chunks) if portions == 5 else (self.in_chunks, self.amid)
        travel.handling.towards(worked_s / sum(handling_s(self.rates, self.work, n) / 2 for n in (*sent, rows)))
        other.handling.drift(travel.handling)
        fixed_s, all_s = (exchange_s(self.rates, self.work.row_bytes, n, self.transport.world_size) for n in (0, rows))
        link_s = max(took_s - worked_s * self.crowding.value, SHORT * took_s)
        before = travel.exchange.or_else(other.exchange)
        if self._learn(travel.exchange, fixed_s, all_s, link_s):
            if waited_s <= SHORT * took_s:
                travel.exchange.value = min(travel.exchange.value, before)
            other.exchange.drift(travel.exchange)

    def saw_products(self, rows: int, took_s: float, worked_s: float, passes: int = 1) -> None:
        """Rows that went through this rank's experts in so many passes. worked_s: of the thread that called them.

        Many rows tell what an operation takes, few what a pass over the weights does.
        """
        if not self.measures or not rows:
            return
        pass_s = products_s(self.rates, self.work, 0)
        operations_s, fixed_s = products_s(self.rates, self.work, rows) - pass_s, passes * pass_s * self.passes.value
        if not self._learn(self.products, fixed_s, fixed_s + operations_s, took_s):
            self.passes.towards((took_s - operations_s * self.products.value) / (passes * pass_s))
        elif worked_s > 0:
            self.crowding.towards(min(took_s / worked_s, MOST_CROWDED))

    @staticmethod
    def _learn(factor: Factor, fixed_s: float, all_s: float, took_s: float) -> bool:
        """Whether there was anything to learn: from calls in which rows weigh more than the rest."""
        enough = all_s >= 2 * fixed_s
        if enough:
            factor.towards((took_s - fixed_s) / (all_s - fixed_s))
        return enough
