"""A rank of `test_lost_rank.py`: exchanges until a rank is stopped, and tells what it saw, as JSON lines."""

import json
import os
import sys
import time

import torch

from crossdock.comm import make_transport
from crossdock.errors import CrossdockError
from crossdock.parallel import init


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main(until_lost: bool) -> None:
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    with init("cpu", timeout_s=6) as group:
        transport = make_transport(group)
        sizes = [1] * group.world_size
        transport.all_gather([1], "warm up")
        transport.all_to_all_rows(torch.ones(group.world_size, 2), sizes, sizes, "warm up").wait()
        tell(ready=True)
        if not until_lost:  # what an optimizer imports must not keep the group
            torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        try:
            while until_lost:
                transport.all_gather([1], "count")
                time.sleep(0.05)
        except CrossdockError as error:
            tell(kind=type(error).__name__, message=str(error))
    for _ in range(50):  # a thread that has been told to end takes a moment
        if len(os.listdir("/proc/self/task")) <= before:
            break
        time.sleep(0.05)
    tell(threads_left=len(os.listdir("/proc/self/task")) - before)
    try:
        transport.all_gather([1], "count")
    except CrossdockError as error:
        tell(closed=str(error))


main(sys.argv[1] == "until-lost")
