"""Failures one after another in the same processes, as starting some is slow: all ranks go on as a new group."""

from collections.abc import Callable, Sequence

from crossdock.errors import CrossdockError
from crossdock.parallel import EPGroup, recover


def errors_of(group: EPGroup, works: Sequence[Callable[[EPGroup], object]]) -> list[str]:
    """What this rank raised in each of the works, as "PlanMismatch: rank 0: ...". `group` is used up."""
    said = []
    for work in works:
        try:
            said.append(f"nothing, but returned {work(group)}")
        except CrossdockError as error:
            said.append(f"{type(error).__name__}: {error}")
        group = recover(group, 30.0)
    group.close()
    return said
