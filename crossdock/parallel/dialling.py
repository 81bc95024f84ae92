"""`connect_all`: wires from every rank to every other, and who is to blame where some do not come about.

    card of rank r: host name, address and port it listens at, a secret      every rank knows every card
    rank r dials the ranks below it, and accepts those above, who show its secret; whom it accepts it welcomes

That a connection stands says nothing: the system makes it for a process that is stopped, or still on its way here. A
rank is there once it has said something. A rank may have been there and be stopped since, and others that have not come
may be waiting for it: so nobody is named before all who are connected have been asked.
"""

import json
import socket
import time
from collections.abc import Sequence

from crossdock.parallel.meeting import Card, Listener
from crossdock.parallel.standing import ANSWER_S, SETTLE_S, Failure, name_ranks
from crossdock.parallel.wires import Wires

AGAIN_S = 0.1  # before those are dialled again who were not reached
LONGEST_DIAL_S = 10.0  # the handshake's third repetition comes after 7 s


def connect_all(
    listener: Listener, cards: Sequence[Card], toward: str, deadline: float, keeper: int | None = None
) -> Wires:
    """Wires to the ranks of all `cards`; `toward` is a host that every rank reaches, `deadline` monotonic.

    `keeper` is the rank, if any, whose process may keep the store in which cards are exchanged: others that are missing
    may still wait for its answer. Raises RankFailure naming those who are not there by then, or who have ended, and
    tells those who are; and what another rank has found out before.
    """
    wires = Wires(listener, cards, toward)
    try:
        refused = _dial_all(wires, deadline)
        failure = _missing(wires, refused, keeper, deadline)
        if failure is not None:
            wires.fail(failure)
            raise failure.error(wires.rank, "init")
    except BaseException:
        wires.close()
        raise
    wires.accept_no_more()
    return wires


def _missing(wires: Wires, refused: set[int], keeper: int | None, deadline: float) -> Failure | None:
    """Why not everyone is there, when there is nobody left to wait for; None where all are.

    A rank that has ended ends the wait only with the last of the others: who leaves early is not there to tell them.
    """
    everyone = {card.rank for card in wires.cards} - {wires.rank}

    def ended() -> set[int]:  # not who has gone in good order: what there was to say it has said
        return refused | {rank for rank, lost in wires.lost.items() if lost.told is None}

    with wires.changed:
        wires.waits = True
        left = max(0.0, deadline - time.monotonic())
        wires.changed.wait_for(lambda: wires.told()[0] or everyone <= wires.seen | ended(), left)
        wires.changed.wait_for(lambda: wires.told()[0] or everyone <= wires.seen, SETTLE_S)  # what was on its way
        if everyone <= wires.seen:
            return None
        asked = wires.peers.keys() - wires.lost.keys()
        for rank in asked:
            wires.send(rank, 0, {"kind": "ask", "number": 0})
        wires.changed.wait_for(lambda: wires.told()[0] or asked <= wires.told()[1] | wires.lost.keys(), ANSWER_S)
        told, answered = wires.told()
        gone = ended() | (asked - answered - wires.lost.keys()) or everyone - wires.seen
    if told is not None or not gone:
        return told
    named = tuple(sorted(gone & {keeper} or gone))
    return Failure("silent", named, f"{name_ranks(named)} came, and was not seen again", wires.rank)


def _dial_all(wires: Wires, deadline: float) -> set[int]:
    """Connects to the ranks below; returns who refused.

    One that does not answer takes its share of the time left and is dialled again after the others: they would take
    this rank for lost if it never came to dial them.
    """
    refused: set[int] = set()
    cards = [card for card in wires.cards if card.rank < wires.rank]
    while cards:
        again = []
        for number, card in enumerate(cards):
            if wires.told()[0] is not None:
                return refused
            share = (deadline - time.monotonic()) / (len(cards) - number + 1)
            try:
                wires.admit(_dial(wires, card, min(max(0.1, share), LONGEST_DIAL_S)), card.rank)
            except (ConnectionRefusedError, ConnectionResetError):
                refused.add(card.rank)
            except OSError:  # of timeouts and of networks that are not up yet
                again.append(card)
        if time.monotonic() + AGAIN_S >= deadline:
            break
        if again:
            time.sleep(AGAIN_S)
        cards = again
    return refused


def _dial(wires: Wires, card: Card, wait_s: float) -> socket.socket:
    link = socket.create_connection((wires.address(card), card.port), timeout=wait_s)
    try:
        link.sendall(json.dumps({"rank": wires.rank, "secret": card.secret}).encode() + b"\n")
    except OSError:
        link.close()
        raise
    return link
