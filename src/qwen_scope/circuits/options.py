"""`WhyOptions`: how a graph is found and how much of it is kept; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen_scope.errors import InputError, check_count, check_share

Method = Literal["gradient", "ig", "relp"]


@dataclass(frozen=True)
class WhyOptions:
    """How a graph is found, and how much of it is kept.

    Attributes:
        method: of the effects: `relp`, `gradient` or `ig`; edges follow RelP's rules or else the gradient.
        steps: of `ig` on one piece of its way.
        nodes: at most as many features are kept, those with the largest effects.
        node_share: within a layer the largest effects are kept until they carry this share of the size of all.
        edges: at most as many edges are kept, those that matter most to the target.
        edge_share: an edge is kept if it is at least this share of the size of all that its receiver takes in.
        exact: as many of the largest effects are compared with ablation.

    Raises:
        InputError: no such method, or a number that is out of range.
    """

    method: str = "gradient"
    steps: int = 10
    nodes: int = 200
    node_share: float = 0.8
    edges: int = 2000
    edge_share: float = 0.02
    exact: int = 20

    def __post_init__(self) -> None:
        check_method(self.method)
        for name in ("steps", "nodes", "edges"):
            check_count(name, getattr(self, name))
        check_count("exact", self.exact, 0)
        check_share("the node share", self.node_share)
        check_share("the edge share", self.edge_share, zero=True)


def check_method(method: str) -> Method:
    """The method, if there is such.

    Raises:
        InputError: there is not.
    """
    for known in get_args(Method):
        if method == known:
            return known
    raise InputError(f"a method is one of {', '.join(get_args(Method))}, not {method!r}")
