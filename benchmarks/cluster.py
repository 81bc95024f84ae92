"""Runs a command on an emulated cluster: nodes with slow links between them, on this machine, as root on Linux.

    python benchmarks/cluster.py 2x2                                      what its links give
    python benchmarks/cluster.py 2x2 -- crossdock generate --json         any command, started once for each rank
    python benchmarks/cluster.py 4x1 --rate-mbit 400 -- python train.py

Ranks find what torchrun would have set, and end together. See crossdock/cli/bench/cluster.py for how it is built.
"""

import argparse
import sys

from crossdock.cli.bench.cluster import Link, Shape, run_on_cluster
from crossdock.errors import ConfigError

HERE = {"python": [sys.executable], "crossdock": [sys.executable, "-m", "crossdock"]}  # not what PATH may hold besides
LINKS = [sys.executable, "-m", "crossdock.cli.bench.links"]


def main() -> int:
    words, command = sys.argv[1:], LINKS
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="NxM", help="nodes and ranks a node")
    parser.add_argument("--rate-mbit", type=int, default=Link.rate_mbit, help="of a node's link, each way")
    parser.add_argument("--latency-us", type=int, default=Link.latency_us, help="one way, in addition (needs netem)")
    parser.add_argument("--burst-kb", type=int, default=Link.burst_kb, help="what may pass at full speed after a pause")
    parser.add_argument("--debug", action="store_true", help="show every rank's output")
    options = parser.parse_args(words)
    if not command:
        parser.error("expected a command behind --")
    try:
        shape, link = Shape.parse(options.shape), Link(options.rate_mbit, options.latency_us, options.burst_kb)
        command = [*HERE.get(command[0], command[:1]), *command[1:]]
        return run_on_cluster(command, shape, link, debug=options.debug)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
