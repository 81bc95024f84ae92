"""`Wires`: a connection from every rank to every other, beside those that rows travel on, and a thread that reads them.

They carry no data. They are there so that a rank learns at once that another's process ended (the system closes its
connections), can tell the others why it gives up, and can be asked where it stands while it computes or sleeps. Lines
of JSON travel on them; the thread sleeps in `select` until one comes. What a router or firewall forgets for its silence
the system keeps known.

How they come about: `crossdock.parallel.dialling`.

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
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from crossdock.parallel.meeting import Card, Listener
from crossdock.parallel.standing import Failure, Lost, Place, Standing

LONGEST_GREETING = 256  # bytes of the first line, from whoever connects
CHUNK = 65536
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

    def __init__(self, listener: Listener, cards: Sequence[Card], toward: str) -> None:
        """Accepts from now on who shows the secret of this rank's card; `cards` are all ranks', `toward` is a host that
        every rank reaches."""
        self.rank, self.listener, self.cards, self._toward = listener.card.rank, listener, cards, toward
        self.changed = threading.Condition(threading.RLock())
        self.lost: dict[int, Lost] = {}
        self.peers: dict[int, _Peer] = {}
        self.seen: set[int] = set()  # those of them who have said something
        self.waits = False  # for ranks that have not said anything yet
        self._failure: Failure | None = None  # why this rank will not have all connections
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

    def address(self, card: Card) -> str:
        """Where the rank of `card` is reached from here."""
        # some machines know themselves by a loopback address, which is another machine here
        astray = _is_loopback(card.address) and card.host != self.listener.card.host
        return self._toward if astray else card.address

    def admit(self, link: socket.socket, rank: int) -> None:
        """From now on `link` is the connection to `rank`, who has been dialled."""
        self._admit(_Peer(link), rank, is_seen=False)

    def fail(self, failure: Failure) -> None:
        """Tells all who are connected, and who connects from now on, why this rank leaves."""
        with self.changed:
            self._failure = failure
            for rank in self.peers:
                self.send(rank, 0, {"kind": "fail", "failure": failure.told()})

    def told(self) -> tuple[Failure | None, set[int]]:
        """What has come before this rank's first handler: the group's failure, and who has said where it stands."""
        early = self._early.get(0, [])
        failures = [Failure.heard(message["failure"]) for _, message in early if message["kind"] == "fail"]
        return next(iter(failures), None), {sender for sender, message in early if message["kind"] == "say"}

    def accept_no_more(self) -> None:
        """Everybody has come."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self.listener.socket)
        self.listener.socket.close()

    def _admit(self, peer: _Peer, rank: int, is_seen: bool) -> None:
        peer.rank = rank
        peer.link.setblocking(False)
        peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(peer.link)
        with self.changed:  # who waits for the last to come may close at once; what comes first may ask for an answer
            self.peers[rank] = peer
            self._selector.register(peer.link, selectors.EVENT_READ, peer)
            if is_seen:
                self.seen.add(rank)
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
        """Reads what a connection brought: a greeting, messages (of which the first is a welcome), or its end."""
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
                    self.seen.add(peer.rank)
                    self._handle(peer.rank, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # another version of this program
                self._lose(peer, f"it sent what cannot be read ({error})")
            if not chunk:
                self._lose(peer, ENDED)
            self.changed.notify_all()

    def _greet(self, peer: _Peer, line: bytes) -> bool:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError):  # it may have ended again
            greeting = json.loads(line)
            rank = greeting["rank"]
            known = rank in {card.rank for card in self.cards if card.rank > self.rank} - self.peers.keys()
            if known and secrets.compare_digest(greeting["secret"], self.listener.card.secret):
                with self.changed:
                    self._admit(peer, rank, is_seen=True)
                    self.send(rank, -1, {"kind": "welcome"})
                    if self._failure is not None:
                        self.send(rank, 0, {"kind": "fail", "failure": self._failure.told()})
                return True
        return False

    def _handle(self, sender: int, message: Message) -> None:
        if message["kind"] == "bye":
            told = {name: Place.heard(place) for name, place in message["standing"].items()}
            self.lost.setdefault(sender, Lost("left the group", told))
        elif message["epoch"] in self._handlers:
            self._handlers[message["epoch"]](sender, message)
        elif message["kind"] == "ask" and message["epoch"] == 0:
            standing = {f"start of rank {self.rank}": self._start().told()} if self.waits else {}
            self.send(sender, message["epoch"], {"kind": "say", "number": message["number"], "standing": standing})
        elif message["kind"] != "welcome":
            self._early.setdefault(message["epoch"], []).append((sender, message))

    def _start(self) -> Place:
        """Where this rank stands before it is anywhere: it waits for those it has not seen."""
        unseen = {card.rank for card in self.cards} - self.seen - {self.rank}
        return Place((self.rank, *sorted(unseen)), turn=1, waiting=1)

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
