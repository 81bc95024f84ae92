"""An emulated cluster: N nodes of M ranks on one Linux machine, each node a set of namespaces behind a slow link.

    node 0                                switch                                node 1
    rank 0, rank 1 -- eth0 ===slow=== port0 -- bridge -- port1 ===slow=== eth0 -- rank 2, rank 3
       `-- lo --'                                                                   `-- lo --'

Both ends of a link are throttled, so a node sends and receives at the rate at once, and ranks of a node share it.
Packets to a node's own address never leave its loopback, so ranks of one node talk at full speed. Each node has a host
name of its own, which is how crossdock tells nodes apart, and its own /dev/shm, so that memory is shared inside a node
only.

The namespaces have no names: they live as long as the node's first process, which ends with the pipe to the launcher,
and the kernel then ends every other process of the node. So nothing is left behind, not even by a launcher killed with
SIGKILL, and nothing has to be swept up. Rejected: `ip netns add`, whose names outlive the run that made them; one
torchrun a node, which tells an error once for each rank; a burst of 4 MB, which lets the first megabytes of each
exchange pass for nothing.
"""

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from crossdock.cli.launch import run_ranks
from crossdock.errors import ConfigError

MOST_NODES = 250  # of one /24
TOOLS = ("ip", "tc", "unshare", "nsenter")
NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
START_S = 20.0  # how long a node, or a command on its network, may take to be ready
STOP_S = 5.0  # how long a node may take to end
LIMIT = "2mb"  # queued at a link before packets are dropped; of 64 MB, rows one way hold up the answers to the other's
RENO = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"  # others fill such links in both directions by turns

# Host name and /etc/hosts of the node. Tells its process id as the launcher sees it (its own /proc would say 1), then
# waits for the pipe.
NODE = """
set -e
read -r pid rest < /proc/self/stat
echo "$1" > /proc/sys/kernel/hostname
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
echo "$2" > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/hosts
ip link set lo up
echo "$pid"
exec cat
"""

# A rank's way into its node: ranks a node, nodes, each node's process id, then the command. The launcher sets RANK.
ENTER = """
export LOCAL_WORLD_SIZE="$1" LOCAL_RANK=$((RANK % $1)) MASTER_ADDR=10.0.0.1 GLOO_SOCKET_IFNAME=eth0
eval node="\\${$((RANK / $1 + 3))}"
shift $(($2 + 2))
exec nsenter --target "$node" --net --uts --ipc --pid --mount --wd -- "$@"
"""

Enter = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Link:
    """A node's link: `rate_mbit` in 1e6 bits a second each way; `latency_us` one way, on top of the kernel's own.

    `burst_kb` may pass at full speed after a pause. A latency needs the kernel's netem. Raises ConfigError for values
    that no link has.
    """

    rate_mbit: int = 800
    latency_us: int = 0
    burst_kb: int = 256

    def __post_init__(self) -> None:
        if self.rate_mbit < 1 or self.burst_kb < 1 or self.latency_us < 0:
            raise ConfigError(f"a link's rate and burst must be at least 1, its latency at least 0, found {self}")


@dataclass(frozen=True)
class Shape:
    """N nodes of M ranks, written "NxM"."""

    nodes: int
    ranks_per_node: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises ConfigError for anything but NxM with two ranks or more in all."""
        found = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text)
        nodes, ranks = map(int, found.groups()) if found else (0, 0)
        if not 1 <= nodes <= MOST_NODES or nodes * ranks < 2:
            raise ConfigError(
                f"a cluster is written NODESxRANKS, such as 2x2, with 1 to {MOST_NODES} nodes and 2 ranks or more in "
                f"all, found {text!r}"
            )
        return cls(nodes, ranks)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def run_on_cluster(command: Sequence[str], shape: Shape, link: Link, *, debug: bool = False) -> int:
    """`run_ranks` of launch.py on an emulated cluster. Raises ConfigError where there can be none here."""
    with emulated_cluster(shape, link) as enter:
        return run_ranks(enter(command), shape.ranks, debug=debug)


@contextmanager
def emulated_cluster(shape: Shape, link: Link) -> Iterator[Enter]:
    """Gives a function from a command to one that runs it in the node of its RANK. Everything is gone afterwards.

    Raises ConfigError where this is no Linux, where we are not root, and where a tool or the kernel lacks something.
    """
    _check_machine()
    with ExitStack() as stack:
        lifeline_read, lifeline = os.pipe()
        nodes: list[_Node] = []
        stack.callback(_end, nodes)
        stack.callback(os.close, lifeline)  # called first: the nodes end by it
        try:
            hosts = "".join(f"{_address(n)} node{n}\n::ffff:{_address(n)} node{n}\n" for n in range(shape.nodes))
            for name in ("switch", *(f"node{n}" for n in range(shape.nodes))):
                nodes.append(_Node(name, f"127.0.0.1 localhost\n{hosts}", lifeline_read))
            switch, *others = nodes
            switch.run("ip link add name bridge up type bridge")
            for number, node in enumerate(others):
                _join(switch, node, number, link)
        finally:
            os.close(lifeline_read)
        pids = [str(node.pid) for node in others]
        yield lambda command: ["sh", "-c", ENTER, "sh", str(shape.ranks_per_node), str(len(pids)), *pids, *command]


class _Node:
    """The namespaces of one node, held by its first process."""

    def __init__(self, name: str, hosts: str, lifeline: int) -> None:
        self.holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "sh", "-c", NODE, "sh", name, hosts],
            stdin=lifeline,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C reaches the launcher, which ends the ranks first
            text=True,
        )
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if not select.select([self.holder.stdout], [], [], START_S)[0]:
            self.holder.kill()  # --kill-child: its child goes with it, and the read below ends
        line = self.holder.stdout.readline()
        if not line:
            why = _last_line(self.holder.stderr.read())
            self.end()
            raise ConfigError(f"an emulated cluster cannot have its namespaces here: {why}")
        self.pid = int(line)

    def run(self, script: str) -> None:
        """Runs shell commands on the node's network. Raises ConfigError with what the first that fails says."""
        command = ["nsenter", "--target", str(self.pid), "--net", "--", "sh", "-e", "-c", script]
        where = f"an emulated cluster cannot have its network here: {script}"
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=START_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{where}: not done within {START_S:g} s") from None
        if done.returncode:
            raise ConfigError(f"{where}: {_last_line(done.stderr)}")

    def end(self) -> None:
        """Waits until the node's last process is gone; its first one ends when the lifeline is closed."""
        try:
            self.holder.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.holder.kill()
            self.holder.wait()
        for stream in (self.holder.stdout, self.holder.stderr):
            if stream is not None:
                stream.close()


def _join(switch: _Node, node: _Node, number: int, link: Link) -> None:
    """A pair of interfaces between node and switch, throttled at both ends."""
    shaper = f"root handle 1: tbf rate {link.rate_mbit}mbit burst {link.burst_kb}kb limit {LIMIT}"
    port = f"port{number}"
    pair = f"ip link add name {port} type veth peer name eth0 netns {node.pid}"
    switch.run(f"{pair}; ip link set {port} master bridge up; tc qdisc add dev {port} {shaper}")
    node.run(f"ip address add {_address(number)}/24 dev eth0; ip link set eth0 up; tc qdisc add dev eth0 {shaper}")
    node.run(RENO)
    if link.latency_us:
        node.run(f"tc qdisc add dev eth0 parent 1: handle 10: netem delay {link.latency_us}us limit 1000000")


def _address(number: int) -> str:
    return f"10.0.0.{number + 1}"


def _end(nodes: list[_Node]) -> None:
    for node in nodes:
        node.end()


def _check_machine() -> None:
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"an emulated cluster needs Linux, whose namespaces are its nodes; this is {sys.platform}")
    if os.geteuid() != 0:
        raise ConfigError(f"an emulated cluster needs root to make namespaces and links; this is user {os.geteuid()}")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_environment()["PATH"]) is None]
    if missing:
        raise ConfigError(f"an emulated cluster needs {', '.join(missing)} (of the packages iproute2 and util-linux)")


def _environment() -> dict[str, str]:
    """Ours, with the folders where system tools stand, which a user's PATH may leave out."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
