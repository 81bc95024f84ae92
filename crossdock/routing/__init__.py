"""Routing: which experts serve which token, and with what weight. Knows no ranks."""

from crossdock.routing.logits import router_gemm, router_gemm_ref
from crossdock.routing.router import Router
from crossdock.routing.rule import Routing
from crossdock.routing.select import select_experts, select_experts_ref

__all__ = ["Router", "Routing", "router_gemm", "router_gemm_ref", "select_experts", "select_experts_ref"]
