"""Who is where: ranks, nodes, groups, expert placement and balancing; knows no kernels."""

from crossdock.parallel.balancer import BalanceReport, balance_report, balancedness, lower_bound, rebalance
from crossdock.parallel.bounded import bounded
from crossdock.parallel.group import EPGroup, init
from crossdock.parallel.nearest import nearest_replicas
from crossdock.parallel.placement import ExpertPlacement
from crossdock.parallel.recovery import lost_ranks, recover
from crossdock.parallel.topology import Topology

__all__ = [
    "BalanceReport",
    "EPGroup",
    "ExpertPlacement",
    "Topology",
    "balance_report",
    "balancedness",
    "bounded",
    "init",
    "lost_ranks",
    "lower_bound",
    "nearest_replicas",
    "rebalance",
    "recover",
]
