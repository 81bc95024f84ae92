"""A transport of one's own: any object with the members of `crossdock.comm.Transport`. This one counts bytes.

    python examples/own_transport.py

Legend: T tokens, K experts per token, D hidden, S rows sent, R rows received.
"""

import torch
from torch import Tensor

from crossdock import LocalWorld
from crossdock.comm import Dispatcher, Pending, Transport


class Counting:
    """Passes everything on to another transport."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name, self.bytes_sent = inner, "counting", 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def all_to_all_rows(self, rows_SD: Tensor, send: list[int], recv: list[int], phase: str) -> Pending[Tensor]:
        self.bytes_sent += rows_SD.nbytes - send[self.rank] * rows_SD[:1].nbytes  # what leaves this rank
        return self.inner.all_to_all_rows(rows_SD, send, recv, phase)


def exchange(inner: Transport) -> str:
    transport = Counting(inner)
    dispatcher = Dispatcher(transport, num_slots=8, hidden_size=64, dtype=torch.bfloat16)
    slot_ids_TK = torch.tensor([[0, 3], [2, 7], [5, -1]])  # -1: no expert
    inbound = dispatcher.dispatch(torch.ones(3, 64).bfloat16(), dispatcher.plan(slot_ids_TK))
    y_TD = dispatcher.combine(inbound.rows_RD, torch.full((3, 2), 0.5), inbound)
    rows, sums = len(inbound.rows_RD), y_TD[:, 0].tolist()
    return f"rank {transport.rank}: {rows} rows in, {transport.bytes_sent} bytes out, weights add up to {sums}"


print(*LocalWorld(2).run(exchange), sep="\n")
