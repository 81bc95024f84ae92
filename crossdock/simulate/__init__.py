"""What a layer's exchange will cost on machines that are not here: rows counted from real routing, stages timed.

    config.json, or a name --LayerShape--+
    links and rates --------Cluster------+--> program: stages of every chunk --> timeline --> Prediction
    routing of every token --Traffic-----+         (what comm and moe do)

Tokens' experts are drawn or read (workload.py, routing.py) and rows counted from rank to rank (traffic.py, slots.py).
Each stage of a schedule needs a link or a processor for as long as its busiest part does (cost.py, stages.py); the
stages of several chunks run in the order of `crossdock.moe.pipeline` (schedule.py) and share what they need
(timeline.py). What cannot be seen this way: congestion inside the network, clocks that fall, a peer that is late.

Two nodes of 8 GPUs, a layer of DeepSeek-V3, 2048 tokens a rank:

>>> from crossdock.simulate import PRESETS, SHAPES, Choice, Drawn, compare
>>> shape, cluster = SHAPES["deepseek-v3"], PRESETS["h100-400g"]
>>> choice = Choice(hierarchies=("flat", "node"), wires=("fp8",), chunks=(1,))
>>> [found] = compare(shape, cluster, Drawn.skewed(shape), 2048, [16], choice)
>>> for one in found:
...     print(f"{one.schedule}: {one.total_s * 1e6:.0f} us, {one.bytes['inter'].max / 1e6:.1f} MB between nodes")
node fp8: 4708 us, 43.2 MB between nodes
flat fp8: 5801 us, 160.5 MB between nodes
"""

from crossdock.simulate.cluster import PRESETS, Cluster, Link, Processor
from crossdock.simulate.compare import Choice, compare, explain
from crossdock.simulate.predict import LinkBytes, Prediction, predict
from crossdock.simulate.routing import ROUTINGS, popularity, rank_choices, sample_experts
from crossdock.simulate.schedule import HIERARCHIES, PLACEMENTS, WIRES, Schedule
from crossdock.simulate.shape import SHAPES, LayerShape
from crossdock.simulate.slots import Slots
from crossdock.simulate.traffic import Traffic, chunk_bounds, count_chunks, count_traffic
from crossdock.simulate.workload import Drawn, Routing, Traced, read_routing

__all__ = [
    "HIERARCHIES",
    "PLACEMENTS",
    "PRESETS",
    "ROUTINGS",
    "SHAPES",
    "WIRES",
    "Choice",
    "Cluster",
    "Drawn",
    "LayerShape",
    "Link",
    "LinkBytes",
    "Prediction",
    "Processor",
    "Routing",
    "Schedule",
    "Slots",
    "Traced",
    "Traffic",
    "chunk_bounds",
    "compare",
    "count_chunks",
    "count_traffic",
    "explain",
    "popularity",
    "predict",
    "rank_choices",
    "read_routing",
    "sample_experts",
]
