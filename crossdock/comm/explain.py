"""`Traffic`: how many rows and bytes a plan sends to its own rank, inside the node and beyond, and what it saves.

    before   one row for each (token, k), in the layer's dtype, straight to the rank that holds the slot, and back
    after    this plan, hop by hop

Rows only: the integers that a plan exchanges (a few for each row) and weights are not counted. What one rank sends it
says by itself; `summed` adds up all ranks'.

    print(plan.explain())                          this rank's
    print(summed(plan.explain(), transport))       all ranks', a collective

Legend: W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from crossdock.comm.transport import Transport
from crossdock.parallel import Topology

REACHES = ("to itself", "in its node", "to other nodes")


@dataclass(frozen=True)
class Sender:
    """Whose rows: a rank of `topology`, `row_bytes` of each as dispatched, `back_bytes` in the layer's dtype."""

    rank: int
    topology: Topology
    row_bytes: int
    back_bytes: int


@dataclass(frozen=True)
class Hop:
    """One exchange of rows: how many go to each of REACHES, of `row_bytes` each."""

    name: str
    rows: tuple[int, int, int]
    row_bytes: int

    @property
    def bytes(self) -> tuple[int, int, int]:
        own, node, beyond = (count * self.row_bytes for count in self.rows)
        return own, node, beyond

    def __add__(self, other: "Hop") -> "Hop":
        own, node, beyond = (mine + theirs for mine, theirs in zip(self.rows, other.rows, strict=True))
        return Hop(self.name, (own, node, beyond), self.row_bytes)


@dataclass(frozen=True)
class Traffic:
    """The hops of the plain form, and those of the plan."""

    before: tuple[Hop, ...]
    after: tuple[Hop, ...]

    def bytes_before(self) -> tuple[int, ...]:
        """By REACHES."""
        return tuple(map(sum, zip(*(hop.bytes for hop in self.before), strict=True)))

    def bytes_after(self) -> tuple[int, ...]:
        """By REACHES."""
        return tuple(map(sum, zip(*(hop.bytes for hop in self.after), strict=True)))

    def __str__(self) -> str:
        lines = [f"{'':32}" + "".join(f"{reach:>26}" for reach in REACHES)]
        for when, hops, total in (
            ("before", self.before, self.bytes_before()),
            ("after", self.after, self.bytes_after()),
        ):
            lines += [_line(f"{when}: {hop.name}", hop.rows, hop.bytes) for hop in hops]
            lines.append(_line(f"{when}, in all", None, total))
        return "\n".join(lines)


def _line(what: str, rows: Sequence[int] | None, size: Sequence[int]) -> str:
    counted = [""] * len(REACHES) if rows is None else [f"{count:,} rows" for count in rows]
    cells = (f"{count:>14}{_shown(many):>12}" for count, many in zip(counted, size, strict=True))
    return f"{what:32}" + "".join(cells)


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def hop(name: str, rows_W: Sequence[int], sender: Sender, row_bytes: int) -> Hop:
    """The hop in which rank w of the sender's topology gets rows_W[w]."""
    rows = [0, 0, 0]
    for rank, count in enumerate(rows_W):
        is_near = sender.topology.same_node(rank, sender.rank)
        rows[0 if rank == sender.rank else 1 if is_near else 2] += count
    return Hop(name, (rows[0], rows[1], rows[2]), row_bytes)


def plain_hops(sender: Sender, send_counts: Sequence[int], recv_counts: Sequence[int]) -> tuple[Hop, Hop]:
    """A row for each (token, k), there and back."""
    there = hop("dispatch", send_counts, sender, sender.back_bytes)
    return there, hop("combine", recv_counts, sender, sender.back_bytes)


def summed(traffic: Traffic, transport: Transport) -> Traffic:
    """The same over all ranks; a collective."""
    hops = [*traffic.before, *traffic.after]
    gathered = transport.all_gather([count for hop in hops for count in hop.rows], "explain")
    totals = iter([sum(counts) for counts in zip(*gathered, strict=True)])
    found = [replace(hop, rows=(next(totals), next(totals), next(totals))) for hop in hops]
    return Traffic(tuple(found[: len(traffic.before)]), tuple(found[len(traffic.before) :]))
