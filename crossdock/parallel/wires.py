"""`Wires`: a connection from every rank to every other, beside those that rows travel on, and a thread that reads them.

They carry no data. They are there so that a rank learns at once that another's process ended (the system closes its
connections), can tell the others why it gives up, and can be asked where it stands while it computes or sleeps. Lines
of JSON travel on them; the thread sleeps in `select` until one comes. What a router or firewall forgets for its silence
the system keeps known.

    card of rank r: host name, address and port it listens at, a secret      every rank knows every card
    rank r connects to the ranks below it, and accepts those above, who show its secret

Rejected: c10d's store as the place for such notices. It lives in the process of rank 0 and ends with it, a client waits
for its answer without a timeout when that process is stopped, and it can only be polled.
"""

import contextlib
import ipaddress
import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from crossdock.parallel.meeting import Card, Listener
from crossdock.parallel.standing import Failure, Lost, Place, Standing, name_ranks

LONGEST_GREETING = 256  # bytes of the first line, from whoever connects
CHUNK = 65536
LONGEST_DIAL_S = 10.0  # the handshake's third repetition comes after 7 s
IDLE_S = 60  # of silence before the system asks whether a connection still stands; routers forget one after minutes
ENDED = "the process ended"
Message = dict[str, Any]
Handler = Callable[[int, Message], None]


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    option = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
    if option is not None:
        link.setsockopt(socket.IPPROTO_TCP, option, IDLE_S)


class _Peer:
    """One connection, and what has come of a line on it."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.rank, self.pending = link, -1, b""
        self.sending = threading.Lock()

    def lines(self, chunk: bytes) -> list[bytes]:
        *whole, self.pending = (self.pending + chunk).split(b"\n")
        return whole


class Wires:
    """Connections by rank in the world. `changed` is notified after every message and every loss."""

    def __init__(self, listener: Listener, cards: list[Card], toward: str, deadline: float) -> None:
        """Connects to all; raises RankFailure naming those who are not there by `deadline` (monotonic)."""
        self.rank, self.listener, self.cards, self._toward = listener.card.rank, listener, cards, toward
        self.changed = threading.Condition(threading.RLock())
        self.lost: dict[int, Lost] = {}
        self.peers: dict[int, _Peer] = {}
        self._handlers: dict[int, Handler] = {}
        self._early: dict[int, list[tuple[int, Message]]] = {}  # messages of an epoch this rank has not come to
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        for one in (self.listener.socket, self._woken):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._read, name="crossdock wires", daemon=True)
        self._thread.start()
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(itself()))
        try:
            self._connect(deadline)
        except BaseException:
            self.close()
            raise

    def _connect(self, deadline: float) -> None:
        refused = self._dial_all([card for card in self.cards if card.rank < self.rank], deadline)
        everyone = {card.rank for card in self.cards} - {self.rank}
        with self.changed:
            left = max(0.0, deadline - time.monotonic())
            self.changed.wait_for(lambda: everyone <= self.peers.keys() | refused, left)
            missing = everyone - self.peers.keys()
        if missing:  # those who have seen all are to hear of it before this rank leaves
            text = f"{name_ranks(missing)} came, and was not seen again"
            failure = Failure("silent", tuple(sorted(missing)), text, self.rank)
            for rank in list(self.peers):
                self.send(rank, 0, {"kind": "fail", "failure": failure.told()})
            raise failure.error(self.rank, "init")
        with contextlib.suppress(KeyError, ValueError):  # nobody else is to come
            self._selector.unregister(self.listener.socket)
        self.listener.socket.close()

    def address(self, rank: int) -> str:
        """Where `rank` is reached from here."""
        card = next(card for card in self.cards if card.rank == rank)
        # some machines know themselves by a loopback address, which is another machine here
        astray = _is_loopback(card.address) and card.host != self.listener.card.host
        return self._toward if astray else card.address

    def _dial_all(self, cards: list[Card], deadline: float) -> set[int]:
        """Connects to these ranks; returns who could not be reached.

        One that does not answer takes its share of the time left and is dialled again after the others: they would
        take this rank for lost if it never came to dial them.
        """
        refused: set[int] = set()
        while cards:
            again = []
            for number, card in enumerate(cards):
                share = (deadline - time.monotonic()) / (len(cards) - number + 1)
                try:
                    self._admit(self._dial(card, min(max(0.1, share), LONGEST_DIAL_S)), card.rank)
                except TimeoutError:
                    again.append(card)
                except OSError:
                    refused.add(card.rank)
            if time.monotonic() + 0.1 >= deadline:
                return refused | {card.rank for card in again}
            cards = again
        return refused

    def _dial(self, card: Card, wait_s: float) -> _Peer:
        link = socket.create_connection((self.address(card.rank), card.port), timeout=wait_s)
        try:
            link.sendall(json.dumps({"rank": self.rank, "secret": card.secret}).encode() + b"\n")
        except OSError:
            link.close()
            raise
        return _Peer(link)

    def _admit(self, peer: _Peer, rank: int) -> None:
        peer.rank = rank
        peer.link.setblocking(False)
        peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(peer.link)
        self._selector.register(peer.link, selectors.EVENT_READ, peer)
        with self.changed:  # who waits for the last to come may close at once
            self.peers[rank] = peer
            with contextlib.suppress(OSError):  # full: it is about to wake
                self._wake.send(b".")  # the thread may be in a select that does not know of it
            self.changed.notify_all()

    def on_messages(self, epoch: int, handler: Handler) -> None:
        """From now on messages of `epoch` go to `handler`, in this rank's reading thread; earlier ones at once."""
        with self.changed:
            self._handlers[epoch] = handler
            for sender, message in self._early.pop(epoch, []):
                handler(sender, message)
            self.changed.notify_all()

    def send(self, rank: int, epoch: int, message: Message) -> None:
        """Never waits: a connection that takes no more is closed, as its rank has not read for very long."""
        peer = self.peers.get(rank)
        if peer is None or rank in self.lost:
            return
        line = json.dumps({"epoch": epoch} | message).encode() + b"\n"
        try:
            with peer.sending:
                whole = peer.link.send(line) == len(line)
        except OSError:
            whole = False
        if not whole:
            with contextlib.suppress(OSError):
                peer.link.shutdown(socket.SHUT_RDWR)  # the reading thread finds it ended

    def close(self, standing: Standing | None = None) -> None:
        """Says goodbye, with where this rank stands, and lets go of all; the thread ends."""
        told = {name: place.told() for name, place in (standing or {}).items()}
        for rank in list(self.peers):
            self.send(rank, -1, {"kind": "bye", "standing": told})
        with contextlib.suppress(OSError):  # closed before
            self._wake.shutdown(socket.SHUT_RDWR)  # which a forked child's copy does not hold up
        self._wake.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def cut(self, rank: int, why: str) -> None:
        """Takes a rank for lost from now on."""
        with self.changed:
            self._lose(self.peers[rank], why)

    def _read(self) -> None:
        """The thread: until `close` closes its end of the wake pair."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    if not self._woken.recv(CHUNK):
                        return self._end()
                elif key.fileobj is self.listener.socket:
                    self._accept()
                else:
                    self._take(key.data)

    def _end(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self.listener.socket.accept()
            link.setblocking(False)
            self._selector.register(link, selectors.EVENT_READ, _Peer(link))

    def _take(self, peer: _Peer) -> None:
        """Reads what a connection brought: a greeting, messages, or its end."""
        try:
            chunk = peer.link.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        lines = peer.lines(chunk)
        if peer.rank < 0:
            if not lines and chunk and len(peer.pending) <= LONGEST_GREETING:
                return
            self._selector.unregister(peer.link)
            if not lines or not self._greet(peer, lines.pop(0)):
                peer.link.close()
                return
        with self.changed:
            try:
                for line in lines:
                    self._handle(peer.rank, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # another version of this program
                self._lose(peer, f"it sent what cannot be read ({error})")
            if not chunk:
                self._lose(peer, ENDED)
            self.changed.notify_all()

    def _greet(self, peer: _Peer, line: bytes) -> bool:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            greeting = json.loads(line)
            rank = greeting["rank"]
            known = rank in {card.rank for card in self.cards if card.rank > self.rank} - self.peers.keys()
            if known and secrets.compare_digest(greeting["secret"], self.listener.card.secret):
                self._admit(peer, rank)
                return True
        return False

    def _handle(self, sender: int, message: Message) -> None:
        if message["kind"] == "bye":
            told = {name: Place.heard(place) for name, place in message["standing"].items()}
            self.lost.setdefault(sender, Lost("left the group", told))
        elif message["epoch"] in self._handlers:
            self._handlers[message["epoch"]](sender, message)
        else:
            self._early.setdefault(message["epoch"], []).append((sender, message))

    def _lose(self, peer: _Peer, why: str) -> None:
        self.lost.setdefault(peer.rank, Lost(why))
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.link)
        peer.link.close()
        self.changed.notify_all()


def _forget(wires: Wires | None) -> None:
    """In a forked child: closes its copies, which would hold up the news that the rank itself has ended."""
    if wires is not None:
        wires.listener.socket.close()
        for peer in list(wires.peers.values()):
            peer.link.close()
