"""`Cluster`: what a prediction needs to know of the machines: links, and what moves and multiplies rows on each rank.

Three resources, because they are what an exchange can be bound by: `inter`, a rank's or a node's way to other nodes;
`intra`, a rank's way to the others of its node; `processor`, which copies, converts, sums and multiplies. Ranks that
share a processor (processes on the cores of one machine) wait for one another; a GPU is a processor of its own. Rates
of a processor are what one of its cores reaches while all are busy.

A preset gives each number with its source. Measured rates are better: `crossdock plan --calibrate FILE` takes them on
CPUs, and `Cluster.from_json` reads such a file, or one written by hand.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from crossdock.errors import ConfigError

FLAGS = ("shared", "host")


@dataclass(frozen=True)
class Link:
    """bytes_per_s in each direction; latency_s of a collective without rows, beyond call_s; `shared` by a node."""

    bytes_per_s: float
    latency_s: float
    shared: bool = False


@dataclass(frozen=True)
class Processor:
    """Rates of one core, in bytes or operations a second.

    ranks, cores   how many ranks share it, and how many cores it has; a rank uses one at a time
    plan           (token, k) choices put in order
    gather         rows written by an index
    reduce         rows read by a weighted sum
    encode         bfloat16 rows turned into FP8
    decode         bfloat16 rows made of FP8
    local          rows that a rank sends to itself
    wire           rows sent to other ranks: what the transport's copies cost the processors of both ends, at the sender
    matmul         operations of grouped products in bfloat16
    matmul_fp8     the same in FP8
    weights        weights read where rows are few
    call_s         seconds of a rank for each exchange besides its rows: launches, waking up; of a GPU's host, or else
                   of the ranks' cores
    host           plans are made by another processor, beside this one: a GPU's host
    """

    ranks: int
    cores: int
    plan: float
    gather: float
    reduce: float
    encode: float
    decode: float
    local: float
    wire: float
    matmul: float
    matmul_fp8: float
    weights: float
    call_s: float
    host: bool = False


@dataclass(frozen=True)
class Cluster:
    """Nodes of `ranks_per_node` ranks; `sources` says where each number is from."""

    name: str
    ranks_per_node: int
    intra: Link
    inter: Link
    processor: Processor
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in (self.intra, self.inter, self.processor):
            for name, value in asdict(part).items():
                least_is_zero = name in ("latency_s", "call_s", *FLAGS)
                if not (value >= 0 if least_is_zero else value > 0) or not isfinite(value):
                    least = "at least 0" if least_is_zero else "above 0"
                    raise ConfigError(f"cluster {self.name!r}: {name} must be {least} and finite, found {value}")
        if self.ranks_per_node < 1:
            raise ConfigError(f"cluster {self.name!r}: ranks_per_node must be at least 1, found {self.ranks_per_node}")

    def nodes(self, ranks: int) -> int:
        """How many nodes `ranks` fill; fewer ranks than a node has are one node. Raises ConfigError for a rest."""
        if ranks < 1 or (ranks > self.ranks_per_node and ranks % self.ranks_per_node):
            raise ConfigError(f"{ranks} ranks do not fill nodes of {self.ranks_per_node} ({self.name})")
        return max(1, ranks // self.ranks_per_node)

    def changed(self, values: Mapping[str, float | bool]) -> "Cluster":
        """The same with other values: {"inter.bytes_per_s": 90e9, "ranks_per_node": 4}. Raises ConfigError for a name
        that there is not, or a value that cannot be."""
        data = self.to_json()
        for key, value in values.items():
            *path, name = key.split(".")
            part = data if not path else data.get(path[0])
            if len(path) > 1 or not isinstance(part, dict) or name not in part or isinstance(part[name], dict | str):
                raise ConfigError(f"a cluster has no number {key!r}")
            whole = type(part[name]) is int and float(value).is_integer()  # infinity and NaN are no integers
            part[name] = int(value) if whole else value
        return Cluster.from_json(data)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Cluster":
        """From `to_json`'s object. Raises ConfigError naming a key that is missing, unknown or of the wrong type."""
        if not isinstance(data, dict):
            raise ConfigError(f"a cluster must be a JSON object, found {type(data).__name__}")
        parts = {"intra": Link, "inter": Link, "processor": Processor}
        found = {key: _read(kind, data.get(key), f"cluster.{key}") for key, kind in parts.items()}
        name, per_node = data.get("name"), data.get("ranks_per_node")
        unknown = set(data) - set(found) - {"name", "ranks_per_node", "sources"}
        if unknown or not isinstance(name, str) or per_node is None:
            raise ConfigError(f"a cluster needs a name, ranks_per_node, {', '.join(parts)}; found {sorted(data)}")
        if type(per_node) is not int:
            raise ConfigError(f"cluster {name!r}: ranks_per_node must be an integer, found {per_node!r}")
        return cls(name, per_node, **found, sources=tuple(map(str, data.get("sources", ()))))


def _read(kind: type, data: Any, where: str) -> Any:
    """A Link or Processor from a JSON object; numbers only."""
    names = [field.name for field in fields(kind)]
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object with {', '.join(names)}, found {data!r}")
    for name, value in data.items():
        expected = bool if name in FLAGS else int if name in ("ranks", "cores") else (int, float)
        right = isinstance(value, expected) and (name in FLAGS or not isinstance(value, bool))
        if name not in names or not right:
            raise ConfigError(f"{where}.{name} is no field with a number, found {value!r}")
    missing = [name for name in names if name not in data and name not in FLAGS]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return kind(**data)


# A copy reads and writes each byte, so it has half the memory's bandwidth.
_PRODUCTS = "products: 78% of the data sheet's 1979 and 989 dense TFLOP/s, the share of DeepGEMM's best (1550, H800)"
_LATENCY = "latencies: what DeepEP V1's low-latency kernels take besides their bytes, EP8 to EP256 (32 us)"
_CX7 = "inter: 45.5 GB/s of 50, DeepEP V2 over CX7: 90 GB/s at EP 8x2, of which half stays local; 61 at 8x4, 3/4 leave"
_NVLINK = "intra: 79% of NVLink's 450 GB/s each way, the share that DeepEP V1 has of an H800's 200 GB/s (158)"
_HOST = "plan: one core of an AMD EPYC (Zen 4), measured; call_s: launches and a wait for counts, estimated"


def _gpu(memory: float) -> Processor:
    copy = memory / 2
    return Processor(
        ranks=1, cores=1, plan=20e6, gather=copy, reduce=memory, encode=copy, decode=copy, local=copy, wire=memory,
        matmul=775e12, matmul_fp8=1550e12, weights=memory, call_s=20e-6, host=True,
    )  # fmt: skip


_CX7_LINK = Link(45.5e9, 32e-6)
PRESETS = {
    "h100-400g": Cluster(
        "h100-400g", 8, Link(355e9, 32e-6), _CX7_LINK, _gpu(3.35e12),
        ("memory: 3.35 TB/s, H100 SXM data sheet", _NVLINK, _CX7, _LATENCY, _PRODUCTS, _HOST),
    ),
    "h200-400g": Cluster(
        "h200-400g", 8, Link(355e9, 32e-6), _CX7_LINK, _gpu(4.8e12),
        ("memory: 4.8 TB/s, H200 SXM data sheet", _NVLINK, _CX7, _LATENCY, _PRODUCTS, _HOST),
    ),
    "h800-400g": Cluster(
        "h800-400g", 8, Link(158e9, 32e-6), _CX7_LINK, _gpu(3.35e12),
        ("memory: 3.35 TB/s, as the H100", "intra: DeepEP V1, combine at EP8: 158 GB/s of NVLink's 200 each way",
         _CX7, _LATENCY, _PRODUCTS, _HOST),
    ),
    "emulated-2x2": Cluster(
        "emulated-2x2", 2, Link(4.1e9, 2e-4), Link(95e6, 8e-4, shared=True),
        Processor(
            ranks=4, cores=2, plan=30e6, gather=5.9e9, reduce=2.2e9, encode=1.25e9, decode=3.5e9, local=6.4e9,
            wire=2.6e9, matmul=199e9, matmul_fp8=199e9, weights=15e9, call_s=4e-4,
        ),
        ("inter: 800 Mbit/s each way for a node's ranks together, 95 MB/s by gloo; intra: one pair by gloo",
         "latencies: an exchange of one row with all, gloo, beyond call_s: what it takes of the cores",
         "products, memory and all else: seconds of an AMD EPYC (Zen 4) core, one operation at a time in four ranks",
         "`crossdock plan --emulate 2x2 --calibrate FILE` measures yours"),
    ),
}  # fmt: skip
