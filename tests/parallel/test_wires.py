"""The connections between ranks: lines arrive, ends are noticed, strangers are turned away, early lines wait."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import pytest

from crossdock.errors import CommTimeout, PlanMismatch, RankFailure
from crossdock.parallel import dialling
from crossdock.parallel.dialling import connect_all
from crossdock.parallel.meeting import Card, Listener
from crossdock.parallel.standing import Failure
from crossdock.parallel.watch import Watch
from crossdock.parallel.wires import Wires

WAIT_S = 10.0


@contextmanager
def wired(world_size: int, before: Sequence[Callable[[list[Listener]], None]] = ()) -> Iterator[list[Wires]]:
    """Wires of all ranks, in one process; those of rank 0 listen, without the others, while `before` is called."""
    listeners = [Listener(rank, "127.0.0.1") for rank in range(world_size)]
    cards = [listener.card for listener in listeners]
    made: dict[int, Wires] = {}

    def make(rank: int) -> None:
        made[rank] = connect_all(listeners[rank], cards, "127.0.0.1", time.monotonic() + WAIT_S)

    threads = [Thread(target=make, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
        while before:
            before[0](listeners)
            before = before[1:]
    for thread in threads:
        thread.join()
    try:
        yield [made[rank] for rank in range(world_size)]
    finally:
        for wires in made.values():
            wires.close()


def until(wires: Wires, condition: object) -> bool:
    with wires.changed:
        return wires.changed.wait_for(condition, WAIT_S)  # type: ignore[arg-type]


def test_lines_go_to_the_handler_of_their_epoch_also_early_ones() -> None:
    with wired(3) as (zero, one, two):
        got: list[tuple[int, str]] = []
        two.on_messages(0, lambda sender, message: got.append((sender, message["kind"])))
        zero.send(2, 1, {"kind": "later"})
        for number in range(50):
            zero.send(2, 0, {"kind": f"note {number}"})
        one.send(2, 0, {"kind": "other"})
        assert until(two, lambda: len(got) == 51)
        assert [kind for sender, kind in got if sender == 0] == [f"note {number}" for number in range(50)]
        assert (1, "other") in got
        two.on_messages(1, lambda sender, message: got.append((sender, message["kind"])))
        assert until(two, lambda: (0, "later") in got)


def test_an_end_without_a_word_and_one_with_a_goodbye() -> None:
    with wired(3) as (zero, one, two):
        watch = Watch(one, (0, 1, 2))
        watch.channel("world", (0, 1, 2), 1.0).enter("plan")
        watch.close()
        for wires in (zero, two):
            assert until(wires, lambda wires=wires: 1 in wires.lost)
            assert wires.lost[1].why == "left the group" and wires.lost[1].was_there("world", 1)
            assert not wires.lost[1].was_there("world", 2) and not wires.lost[1].was_there("part", 1)
        zero.peers[2].link.shutdown(socket.SHUT_RDWR)  # as when a process is killed
        assert until(two, lambda: 0 in two.lost)
        assert two.lost[0].why == "the process ended" and not two.lost[0].was_there("world", 1)


@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "secret": "guessed"}\n', b"[1]\n", b"\xff\xfe\n", b"x" * 5000, b""],
)
def test_a_stranger_is_turned_away(greeting: bytes) -> None:
    def stranger(listeners: list[Listener]) -> None:
        """Comes before any rank does, and waits for its end."""
        card = listeners[0].card
        with socket.create_connection((card.address, card.port), WAIT_S) as link:
            link.sendall(greeting)
            link.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                answers.append(link.recv(10))

    answers: list[bytes] = []
    with wired(2, [stranger]) as (zero, one):
        assert answers in ([b""], [])
        got: list[str] = []
        zero.on_messages(0, lambda sender, message: got.append(message["kind"]))
        one.send(0, 0, {"kind": "still here"})
        assert until(zero, lambda: got == ["still here"]) and not zero.lost


def test_a_rank_that_does_not_connect_is_named_to_those_who_do() -> None:
    """Rank 2 is not there; rank 1, which does not look for it, hears so from rank 0."""
    listeners = [Listener(rank, "127.0.0.1") for rank in (0, 1)]
    absent = Card(2, "elsewhere", "127.0.0.1", 1, "")
    cards = [listeners[0].card, listeners[1].card]
    found: list[Wires] = []
    other = Thread(
        target=lambda: found.append(connect_all(listeners[1], cards, "127.0.0.1", time.monotonic() + WAIT_S))
    )
    other.start()
    with pytest.raises(RankFailure, match="rank 0: init: rank 2 came, and was not seen again"):
        connect_all(listeners[0], [*cards, absent], "127.0.0.1", time.monotonic() + 1.0)
    other.join()
    watch = Watch(found[0], (0, 1, 2))
    assert until(found[0], lambda: 0 in found[0].lost)
    assert watch.failure is not None and watch.failure.ranks == (2,)
    watch.close()


class Pretender:
    """Rank `rank`, of three, as far as the system and its reading thread go; its main thread does nothing."""

    def __init__(self, rank: int, reads: bool = True) -> None:
        self.listener = Listener(rank, "127.0.0.1")
        self.wires = Wires(self.listener, [self.listener.card], "127.0.0.1") if reads else None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """As by SIGSTOP: connections stand, and what comes on them is not answered."""
        assert self.wires is not None
        with self.wires.changed:
            yield


def init_of(
    rank: int, pretenders: Sequence[Pretender], wait_s: float = 1.0, keeper: int | None = 0
) -> tuple[str, float]:
    """What rank `rank` raises while it becomes one of three, and after how long."""
    listener, began = Listener(rank, "127.0.0.1"), time.monotonic()
    cards = sorted([listener.card, *(one.listener.card for one in pretenders)], key=lambda card: card.rank)
    for one in pretenders:
        if one.wires is not None:
            one.wires.cards = cards
    with pytest.raises(RankFailure) as failed:
        connect_all(listener, cards, "127.0.0.1", began + wait_s, keeper)
    return str(failed.value), time.monotonic() - began


def test_a_connection_that_nobody_reads_is_not_a_rank() -> None:
    """Rank 0 is stopped once rank 2 has all cards; rank 1, which does not yet, waits for it where all meet."""
    missed = "came, and was not seen again"
    zero, one = (Pretender(rank, reads=False) for rank in range(2))
    assert init_of(2, [zero, one])[0] == f"rank 2: init: rank 0 {missed}"
    assert init_of(2, [zero, one], keeper=None)[0] == f"rank 2: init: rank 0, rank 1 {missed}"
    assert init_of(2, [Pretender(0), one])[0] == f"rank 2: init: rank 1 {missed}"
    assert init_of(2, [zero, Pretender(1)], keeper=None)[0] == f"rank 2: init: rank 0 {missed}"


@pytest.mark.parametrize("keeper", [0, None])
@pytest.mark.parametrize("ends", [False, True])
def test_who_was_there_and_is_no_more_is_named_before_who_waits_for_it(ends: bool, keeper: int | None) -> None:
    """Rank 0 welcomes rank 1 and is stopped, or ends; rank 2 never gets its cards."""
    zero, two, is_over = Pretender(0), Pretender(2, reads=False), Event()

    def fail() -> None:
        assert zero.wires is not None and until(zero.wires, lambda: 1 in zero.wires.seen)  # type: ignore[union-attr]
        time.sleep(0.5)  # the welcome is on its way
        if ends:
            zero.wires.peers[1].link.shutdown(socket.SHUT_RDWR)
        else:
            with zero.stopped():
                is_over.wait(WAIT_S)

    failing = Thread(target=fail)
    failing.start()
    text = init_of(1, [zero, two], 3.0, keeper)[0]
    is_over.set()
    failing.join()
    assert text == "rank 1: init: rank 0 came, and was not seen again"


def test_all_others_accounted_for_the_wait_is_over() -> None:
    """Rank 0 has ended, and so has rank 1, which could not go on without the store there."""
    zero, one = (Pretender(rank, reads=False) for rank in range(2))
    for gone in (zero, one):
        gone.listener.socket.close()
    text, took_s = init_of(2, [zero, one], 60.0)
    assert text == "rank 2: init: rank 0 came, and was not seen again" and took_s < 5.0


def test_who_answers_when_asked_is_no_more_missing() -> None:
    """Rank 0 was busy until after the deadline."""
    zero, listener, is_over = Pretender(0), Listener(1, "127.0.0.1"), Event()
    assert zero.wires is not None
    zero.wires.cards = cards = [zero.listener.card, listener.card]

    def be_busy() -> None:
        with zero.stopped():
            is_busy.set()
            is_over.wait(1.5)

    is_busy, busy = Event(), Thread(target=be_busy)
    busy.start()
    assert is_busy.wait(WAIT_S)
    began = time.monotonic()
    connected = connect_all(listener, cards, "127.0.0.1", began + 0.5, 0)
    assert connected.seen == {0} and time.monotonic() - began > 1.0
    connected.close()
    busy.join()


def test_a_rank_that_still_waits_for_others_says_that_it_is_there() -> None:
    with wired(2) as (zero, one):
        answers: list[object] = []
        zero.on_messages(0, lambda sender, message: answers.append(message))
        one.cards = [*one.cards, Card(2, "elsewhere", "127.0.0.1", 1, "")]  # who has not come
        zero.send(1, 0, {"kind": "ask", "number": 7})
        assert until(zero, lambda: answers)
        standing = {"start of rank 1": [[1, 2], 1, 1, []]}
        assert answers == [{"epoch": 0, "kind": "say", "number": 7, "standing": standing}]


def test_what_another_has_found_is_what_a_rank_that_still_waits_raises() -> None:
    found = Failure("silent", (2,), "rank 2 came, and was not seen again", 1)
    listener = Listener(0, "127.0.0.1")
    cards = [listener.card, *(Card(rank, "elsewhere", "127.0.0.1", 1, "") for rank in (1, 2))]
    dialled = socket.create_connection(("127.0.0.1", listener.card.port))  # as rank 1 does
    dialled.sendall(json.dumps({"rank": 1, "secret": listener.card.secret}).encode() + b"\n")
    told = {"epoch": 0, "kind": "fail", "failure": found.told()}
    dialled.sendall(json.dumps(told).encode() + b"\n")
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"^rank 0: init: rank 2 came, and was not seen again \(found by rank 1\)$"):
        connect_all(listener, cards, "127.0.0.1", began + 60.0, 0)
    assert time.monotonic() - began < 5.0
    dialled.close()


def test_a_dial_that_hangs_makes_no_one_late_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 cannot reach rank 0, as where packets are lost; rank 1, which it dials next, does not miss it."""
    listeners = [Listener(rank, "127.0.0.1") for rank in (1, 2)]
    cards = [Card(0, "elsewhere", "192.0.2.1", 9, ""), *(listener.card for listener in listeners)]
    connect = socket.create_connection

    def hangs(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == "192.0.2.1":
            time.sleep(timeout)
            raise TimeoutError("timed out")
        return connect(address, timeout)

    monkeypatch.setattr(dialling.socket, "create_connection", hangs)
    said: dict[int, str] = {}

    def make(listener: Listener) -> None:
        try:
            connect_all(listener, cards, "127.0.0.1", time.monotonic() + 1.5)
        except RankFailure as error:
            said[listener.card.rank] = str(error)

    threads = [Thread(target=make, args=(listener,)) for listener in listeners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert said.keys() == {1, 2}
    for rank, text in said.items():  # the second has it from the first
        assert text.startswith(f"rank {rank}: init: rank 0 came, and was not seen again"), text


def test_a_dial_that_hangs_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = [Listener(rank, "127.0.0.1") for rank in (0, 1)]
    connect, tries = socket.create_connection, []

    def hangs_once(address: tuple[str, int], timeout: float) -> socket.socket:
        tries.append(timeout)
        if len(tries) == 1:
            raise TimeoutError("timed out")
        return connect(address, timeout)

    monkeypatch.setattr(dialling.socket, "create_connection", hangs_once)
    cards = [listener.card for listener in listeners]
    other = Thread(target=lambda: connect_all(listeners[0], cards, "127.0.0.1", time.monotonic() + WAIT_S).close())
    other.start()
    connect_all(listeners[1], cards, "127.0.0.1", time.monotonic() + 100 * WAIT_S).close()
    other.join()
    assert len(tries) == 2 and max(tries) == dialling.LONGEST_DIAL_S == 10.0


def test_connections_are_kept_alive_and_the_port_is_closed_when_all_are_in() -> None:
    with wired(3) as all_wires:
        for one in all_wires:
            assert one.listener.socket.fileno() == -1
            for peer in one.peers.values():
                assert peer.link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if hasattr(socket, "TCP_KEEPIDLE"):
                    assert peer.link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_a_rank_known_by_a_loopback_address_elsewhere_is_dialled_where_all_meet() -> None:
    with wired(2) as (zero, one):
        here = one.listener.card.host
        for address, host, dialled in [
            ("127.0.1.1", here, "127.0.1.1"),
            ("127.0.1.1", "elsewhere", "127.0.0.1"),
            ("::1", "elsewhere", "127.0.0.1"),
            ("fe80::1%lo", "elsewhere", "fe80::1%lo"),
            ("10.0.0.1", "elsewhere", "10.0.0.1"),
        ]:
            card = replace(zero.listener.card, address=address, host=host)
            assert one.address(card) == dialled


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_a_rank_listens_to_both_families() -> None:
    listener = Listener(0, "127.0.0.1")
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, listener.card.port), WAIT_S).close()
    listener.socket.close()


def test_a_forked_child_does_not_hold_up_the_close() -> None:
    with wired(2) as (zero, _):
        child = os.fork()
        if child == 0:
            time.sleep(60.0)
            os._exit(0)
        began = time.monotonic()
        zero.close()
        assert time.monotonic() - began < 2.0 and not zero._thread.is_alive()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_hundreds_of_ranks_may_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the reading thread can tell itself of before it listens."""
    listener, ranks, made = Listener(0, "127.0.0.1"), range(1, 351), []
    cards = [listener.card, *(Card(rank, "", "127.0.0.1", 9, "") for rank in ranks)]

    class Told(Wires):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(dialling, "Wires", Told)
    links = [socket.create_connection(("127.0.0.1", listener.card.port), WAIT_S) for _ in ranks]
    making = Thread(target=connect_all, args=(listener, cards, "127.0.0.1", time.monotonic() + WAIT_S), daemon=True)
    making.start()
    while not made or len(made[0]._selector.get_map()) < 2 + len(links):  # all accepted, none admitted
        time.sleep(0.01)
    with made[0].changed:  # the first to be admitted holds up the others
        for rank, link in zip(ranks, links, strict=True):
            link.sendall(json.dumps({"rank": rank, "secret": listener.card.secret}).encode() + b"\n")
        time.sleep(0.2)
    making.join(WAIT_S / 2)
    assert not making.is_alive() and made[0].peers.keys() == set(ranks)
    made[0].close()
    for link in links:
        link.close()


def test_a_failure_is_told_once_and_is_the_same_everywhere() -> None:
    with wired(3) as all_wires:
        watches = [Watch(one, (0, 1, 2)) for one in all_wires]
        hooks: list[int] = []
        for rank, watch in enumerate(watches):
            watch.when_failed(lambda rank=rank: hooks.append(rank))
        watches[1].abort("enough")
        for watch in watches:
            assert until(watch.wires, lambda watch=watch: watch.failure is not None)
        watches[2].abort("me too")
        assert watches[2].failure == Failure("abort", (1,), "rank 1 gave up: enough", 1)
        channel = watches[2].channel("world", (0, 1, 2), 1.0)
        with pytest.raises(RankFailure, match="rank 2: plan: rank 1 gave up: enough"):
            channel.enter("plan")
        deadline = time.monotonic() + WAIT_S
        while len(hooks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(hooks) == [0, 1, 2]
        late = Event()
        watches[0].when_failed(late.set)
        assert late.wait(WAIT_S)
        assert sorted(hooks) == [0, 1, 2]


def test_a_wait_ends_with_the_failure_and_not_with_the_timeout() -> None:
    with wired(2) as all_wires:
        zero, one = (Watch(one, (0, 1)) for one in all_wires)
        channel = zero.channel("world", (0, 1), 60.0)
        turn = channel.enter("plan")
        Thread(target=lambda: (time.sleep(0.3), one.abort("enough"))).start()
        began = time.monotonic()

        def poll(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        with pytest.raises(RankFailure, match="rank 0: plan: rank 1 gave up: enough"):
            channel.wait(turn, poll)
        assert time.monotonic() - began < 5.0


def test_a_wait_names_who_is_late_after_asking() -> None:
    with wired(2) as all_wires:
        zero, one = (Watch(one, (0, 1)) for one in all_wires)
        channel, other = zero.channel("world", (0, 1), 0.2), one.channel("world", (0, 1), 0.2)
        for each in (channel, other):
            each.enter("first")
        with pytest.raises(CommTimeout, match=r"rank 0: plan: rank 1 did not arrive within 0.2 s; .* was first"):
            channel.wait(channel.enter("plan"), lambda seconds: bool(time.sleep(seconds)))
        assert until(one.wires, lambda: one.failure is not None)
        with pytest.raises(CommTimeout, match=r"rank 1: plan: the others gave up on this rank \(found by rank 0\)"):
            other.enter("plan")


def breaks(seconds: float) -> bool:
    raise RuntimeError("connection reset by peer\nand more")


def test_an_exchange_that_breaks_early_is_not_blamed_on_who_still_computes() -> None:
    with wired(2) as all_wires:
        zero, one = (Watch(one, (0, 1)) for one in all_wires)
        channel = zero.channel("world", (0, 1), 60.0)
        one.channel("world", (0, 1), 60.0).enter("experts")
        channel.enter("experts")
        with pytest.raises(RankFailure, match=r"^rank 0: plan: the exchange broke: connection reset by peer$"):
            channel.wait(channel.enter("plan"), breaks)
        assert until(one.wires, lambda: one.failure is not None)
        assert one.failure is not None and (one.failure.kind, one.failure.ranks) == ("broken", ())


def test_an_exchange_that_breaks_as_a_rank_is_elsewhere_says_so() -> None:
    with wired(2) as all_wires:
        zero, one = (Watch(one, (0, 1)) for one in all_wires)
        channel = zero.channel("world", (0, 1), 60.0)
        one.channel("world", (0, 1), 60.0).enter("combine")
        with pytest.raises(PlanMismatch, match=r"^rank 0: plan: rank 1 is elsewhere: combine$"):
            channel.wait(channel.enter("plan"), breaks)


def test_a_forked_child_holds_no_connection() -> None:
    """A data loader's, say: the system would not tell of the rank's end while its child lives."""
    with wired(2) as (zero, one):
        child = os.fork()
        if child == 0:
            os._exit(int(zero.peers[1].link.fileno() >= 0 or zero.listener.socket.fileno() >= 0))
        assert os.waitpid(child, 0)[1] == 0
        got: list[str] = []
        one.on_messages(0, lambda sender, message: got.append(message["kind"]))
        zero.send(1, 0, {"kind": "still here"})
        assert until(one, lambda: got == ["still here"]) and not one.lost


def test_what_cannot_be_read_is_no_end_of_reading() -> None:
    with wired(3) as (zero, one, two):
        zero.peers[2].link.send(b"no json" + bytes([10]))
        assert until(two, lambda: 0 in two.lost)
        assert two.lost[0].why.startswith("it sent what cannot be read")
        got: list[str] = []
        two.on_messages(0, lambda sender, message: got.append(message["kind"]))
        one.send(2, 0, {"kind": "still here"})
        assert until(two, lambda: got == ["still here"])


def test_two_waits_ask_at_once_and_both_are_answered() -> None:
    with wired(3) as (zero, one, _):  # rank 2 says nothing
        watch, other = Watch(zero, (0, 1, 2), 1), Watch(one, (0, 1, 2), 1)
        other.channel("world", (0, 1, 2), 5.0).enter("dispatch")
        found: list[dict[int, Any]] = []
        threads = [Thread(target=lambda: found.append(watch.ask())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(found) == 2
        for standings in found:
            assert standings[2] is None and standings[1]["world"].turn == 1
