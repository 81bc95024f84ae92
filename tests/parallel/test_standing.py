"""Blame falls on the ranks a wait leads to: those gone, silent or late, and never on one that nobody waits for."""

import random
import time

from crossdock.errors import CommTimeout, PlanMismatch, RankFailure
from crossdock.parallel.standing import Failure, Lost, Place, Standing, Turn, Wait, blame

ALL = (0, 1, 2, 3)


def stands(**channels: tuple[tuple[int, ...], int, bool]) -> Standing:
    """A rank's standing: by channel its members, the collectives it has entered, and whether it waits for the last."""
    standing = {}
    for name, (members, turns, waits) in channels.items():
        place = standing[name] = Place(members)
        for number in range(1, turns + 1):
            place.enter(f"{name} {number}")
        place.waiting = turns if waits else 0
    return standing


def verdict(standings: dict[int, Standing | None], lost: dict[int, Lost] | None = None, channel: str = "world",
            turn: int = 5) -> Failure:  # fmt: skip
    wait = Wait(0, channel, Turn(turn, f"{channel} {turn}", time.monotonic()), 4.0, 4.0)
    return blame(wait, standings, lost or {})


def test_who_has_not_come_and_waits_for_nothing_is_late() -> None:
    found = verdict({r: stands(world=(ALL, 4 if r == 2 else 5, r != 2)) for r in ALL})
    assert (found.kind, found.ranks) == ("late", (2,))
    assert found.text == "rank 2 did not arrive within 4 s; the last it did was world 4"


def test_who_gives_no_answer_is_silent_and_comes_before_who_is_late() -> None:
    standings = {0: stands(world=(ALL, 5, True)), 1: stands(world=(ALL, 4, False)), 2: None, 3: None}
    found = verdict(standings)
    assert (found.kind, found.ranks) == ("silent", (2, 3))
    assert found.text == "no sign of rank 2, rank 3: gone or stuck"


def test_who_is_gone_comes_first() -> None:
    standings = {0: stands(world=(ALL, 5, True)), 1: stands(world=(ALL, 4, False)), 2: None}
    found = verdict(standings, {3: Lost("the process ended")})
    assert (found.kind, found.ranks, found.text) == ("gone", (3,), "rank 3 is gone: the process ended")


def test_who_left_after_its_part_is_not_missed() -> None:
    standings = {0: stands(world=(ALL, 5, True)), 1: stands(world=(ALL, 5, True)), 2: stands(world=(ALL, 4, False))}
    there, early = stands(world=(ALL, 5, False)), stands(world=(ALL, 4, False))
    assert verdict(standings, {3: Lost("left the group", there)}).ranks == (2,)
    assert verdict(standings, {3: Lost("left the group", early)}).ranks == (3,)


def test_blame_follows_a_rank_that_waits_in_a_part() -> None:
    """Rank 1 has not come because it waits, in a part, for rank 2; rank 3 is in another part and has come."""
    part, other = (1, 2), (0, 3)
    standings = {
        0: stands(world=(ALL, 5, True), other=(other, 2, False)),
        1: stands(world=(ALL, 4, False), part=(part, 3, True)),
        2: stands(world=(ALL, 4, False), part=(part, 2, False)),
        3: stands(world=(ALL, 5, True), other=(other, 2, False)),
    }
    found = verdict(standings)
    assert (found.kind, found.ranks) == ("late", (2,))
    assert found.text.endswith("the last it did was part 2")


def test_of_a_start_who_still_dials_is_named_and_not_who_waits_for_it() -> None:
    """Rank 0 has seen all; ranks 1 and 2 have not yet seen rank 3."""
    standings: dict[int, Standing | None] = {0: {"init": Place(ALL, 1, 1)}, 3: {}}
    standings |= {rank: {f"start of rank {rank}": Place((rank, 3), 1, 1)} for rank in (1, 2)}
    found = verdict(standings, {}, "init", 1)
    assert (found.kind, found.ranks) == ("late", (3,))


def test_a_rank_outside_the_part_is_not_named() -> None:
    """Rank 0 waits in a part; rank 3, outside of it, does nothing and is not asked for."""
    part = (0, 1)
    standings = {0: stands(part=(part, 2, True)), 1: stands(part=(part, 1, False)), 2: stands(), 3: None}
    assert verdict(standings, {2: Lost("the process ended")}, "part", 2).ranks == (1,)


def test_ranks_that_wait_for_one_another() -> None:
    first, second = (0, 1), (1, 0)
    standings = {
        0: stands(first=(first, 2, True), second=(second, 1, False)),
        1: stands(first=(first, 1, False), second=(second, 2, True)),
    }
    found = verdict(standings, channel="first", turn=2)
    assert (found.kind, found.ranks) == ("mismatch", (0, 1))
    assert found.text == "ranks wait for one another: rank 0 in first 2, rank 1 in second 2"


def test_ranks_in_another_phase() -> None:
    standings: dict[int, Standing | None] = {r: stands(world=((0, 1), 4, False)) for r in (0, 1)}
    for rank, phase in ((0, "dispatch"), (1, "combine")):
        place = standings[rank]["world"]  # type: ignore[index]
        place.waiting = place.enter(phase).number
    found = blame(Wait(0, "world", Turn(5, "dispatch", 0.0), 4.0, 4.0), standings, {})
    assert (found.kind, found.text) == ("mismatch", "rank 1 is elsewhere: combine")


def in_phases(*phases: str, broke: str = "") -> Failure:
    """What rank 0 finds where rank r is in phases[r] of the same turn."""
    standings: dict[int, Standing | None] = {}
    for rank, phase in enumerate(phases):
        place = Place(tuple(range(len(phases))))
        place.waiting = place.enter(phase).number
        standings[rank] = {"world": place}
    return blame(Wait(0, "world", Turn(1, phases[0], 0.0), 4.0, 4.0, broke), standings, {})


def test_of_many_ranks_those_in_another_phase_than_most_are_named() -> None:
    found = in_phases("dispatch", "dispatch", "combine", "dispatch")
    assert (found.kind, found.ranks) == ("mismatch", (2,))
    assert found.text == "rank 2 is elsewhere: combine (most are in dispatch)"
    found = in_phases("dispatch", "combine", "combine", "combine")  # found by the one that is
    assert (found.ranks, found.text) == ((0,), "rank 0 is elsewhere: dispatch (most are in combine)")
    found = in_phases("dispatch", "combine", "dispatch", "plan", "dispatch")
    assert found.ranks == (1, 3)
    assert found.text == "rank 1 is elsewhere: combine, rank 3 is elsewhere: plan (most are in dispatch)"


def test_where_no_phase_has_most_ranks_another_than_the_finder_is_named() -> None:
    for phases in (("dispatch", "combine"), ("dispatch", "combine", "dispatch", "combine")):
        found = in_phases(*phases)
        assert (found.kind, found.ranks, found.text) == ("mismatch", (1,), "rank 1 is elsewhere: combine")


def test_nobody_is_late_for_an_exchange_that_broke_before_its_time() -> None:
    part = (1, 2)
    standings = {
        0: stands(world=(ALL, 5, True)),
        1: stands(world=(ALL, 4, False), part=(part, 3, True)),  # waits for rank 2, which computes
        2: stands(world=(ALL, 4, False), part=(part, 2, False)),
        3: stands(world=(ALL, 5, True)),
    }
    wait = Wait(0, "world", Turn(5, "world 5", time.monotonic()), 0.1, 4.0, "connection reset")
    found = blame(wait, standings, {})
    assert (found.kind, found.ranks, found.text) == ("broken", (), "the exchange broke: connection reset")
    assert blame(wait, standings, {3: Lost("the process ended")}).ranks == (3,)
    assert isinstance(found.error(0, "plan"), RankFailure)


def test_an_exchange_that_broke_tells_of_ranks_elsewhere() -> None:
    found = in_phases("dispatch", "combine", "dispatch", broke="other sizes")
    assert (found.kind, found.ranks) == ("mismatch", (1,))
    first, second = (0, 1), (1, 0)
    standings = {
        0: stands(first=(first, 2, True), second=(second, 1, False)),
        1: stands(first=(first, 1, False), second=(second, 2, True)),
    }
    found = blame(Wait(0, "first", Turn(2, "first 2", 0.0), 0.1, 4.0, "reset"), standings, {})
    assert found.text == "ranks wait for one another: rank 0 in first 2, rank 1 in second 2"


def test_who_came_last_is_late_and_else_it_took_too_long() -> None:
    standings = {r: stands(world=(ALL, 5, True)) for r in ALL}
    entered = standings[0]["world"].entered(5)
    assert entered is not None
    early = Wait(0, "world", entered._replace(began=entered.began - 3.9), 4.0, 4.0)
    standings[0]["world"].recent[-1] = standings[1]["world"].recent[-1] = early.turn
    found = blame(early, standings, {})
    assert (found.kind, found.ranks) == ("late", (2, 3))
    assert (
        verdict({r: stands(world=(ALL, 5, True)) for r in ALL}).text == "all ranks came, but it did not end within 4 s"
    )


def test_errors_are_told_from_the_rank_that_raises_them() -> None:
    late = Failure("late", (2,), "rank 2 did not arrive within 4 s", 0)
    assert isinstance(late.error(0, "plan"), CommTimeout)
    assert str(late.error(0, "plan")) == "rank 0: plan: rank 2 did not arrive within 4 s"
    assert str(late.error(1, "plan")) == "rank 1: plan: rank 2 did not arrive within 4 s (found by rank 0)"
    assert str(late.error(2, "plan")).startswith("rank 2: plan: the others gave up on this rank (found by rank 0): ")
    given_up = Failure("abort", (1,), "rank 1 gave up: enough", 1)
    assert isinstance(given_up.error(0, "plan"), RankFailure)
    assert str(given_up.error(1, "plan")) == "rank 1: plan: rank 1 gave up: enough"
    assert isinstance(Failure("mismatch", (1,), "", 0).error(0, ""), PlanMismatch)
    assert Failure.heard(late.told()) == late


def test_a_standing_travels() -> None:
    place = stands(world=(ALL, 20, True))["world"]
    heard = Place.heard(place.told())
    assert (heard.members, heard.turn, heard.waiting) == (ALL, 20, 20)
    assert [turn[:2] for turn in heard.recent] == [turn[:2] for turn in place.recent]
    assert heard.entered(1) is None and heard.entered(20) is not None


def test_whoever_is_named_is_waited_for_by_someone() -> None:
    """Random standings of an exchange whose ranks call world and part in one order, some of them stuck or gone."""
    dice = random.Random(1)
    for _ in range(300):
        stuck = {rank for rank in (1, 2, 3) if dice.random() < 0.3} or {dice.choice((1, 2, 3))}
        gone = {rank: Lost("the process ended") for rank in stuck if dice.random() < 0.5}
        parts = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
        in_part = {rank for rank in ALL if rank not in stuck and stuck & set(parts[rank])}
        standings: dict[int, Standing | None] = {}
        for rank in set(ALL) - gone.keys():
            waits = rank not in stuck
            stays = waits and rank in in_part  # waits in its part for the other of it; else it went on to the world
            turns = (4, 3) if stays else (5, 3) if waits else (4, 2)
            standings[rank] = stands(world=(ALL, turns[0], waits and not stays), part=(parts[rank], turns[1], stays))
            standings[rank] = {
                f"part {parts[rank]}" if name == "part" else name: place for name, place in standings[rank].items()
            }
        channel, turn = ("part (0, 1)", 3) if 0 in in_part else ("world", 5)
        found = verdict(standings, gone, channel, turn)
        owed = {1} if 0 in in_part else stuck
        assert set(found.ranks) and set(found.ranks) <= owed, (stuck, gone.keys(), found)
        assert (found.kind == "gone") == bool(owed & gone.keys())
