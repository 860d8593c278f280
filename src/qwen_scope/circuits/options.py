"""`Question` and `WhyOptions`: what is asked, and how a graph is found; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen_scope.errors import InputError, check_count, check_share

Method = Literal["gradient", "ig", "relp", "joint", "exact"]

DEFAULT: Method = "gradient"
"""The method with the highest correlation with ablation on the prompts that it was chosen on (docs/results.md)."""


@dataclass(frozen=True)
class Question:
    """What is asked about a prompt.

    Attributes:
        token: the token to explain, as it is typed, such as " Paris"; by default the most likely.
        against: explain the difference of logits to this token.
        of: explain the activation of a feature instead, LAYER/FEATURE.
        log_prob: of the token, its log-probability instead of its logit.
        position: of the token before the answer; -1 is the last.

    Raises:
        InputError: two of them that exclude each other.
    """

    token: str | None = None
    against: str | None = None
    of: str | None = None
    log_prob: bool = False
    position: int = -1

    def __post_init__(self) -> None:
        if self.of is not None and (self.token is not None or self.against is not None or self.log_prob):
            raise InputError("--of explains a feature; leave out --token, --against and --log-prob")
        if self.log_prob and self.against is not None:
            raise InputError("--against explains a difference of logits; leave out --log-prob")


@dataclass(frozen=True)
class WhyOptions:
    """How a graph is found, and how much of it is kept.

    Attributes:
        method: of the effects: `gradient`, `ig`, `relp`, `joint` or `exact`; edges follow RelP or else the gradient.
        steps: of `joint`, and of `ig` on one piece of its way.
        nodes: at most as many features are kept, those with the largest effects.
        node_share: within a layer the largest effects are kept until they carry this share of the size of all.
        edges: at most as many edges are kept, those that matter most to the target.
        edge_share: an edge is kept if it is at least this share of the size of all that its receiver takes in.
        exact: as many of the largest effects are compared with ablation, which `exact` itself needs no more.

    Raises:
        InputError: no such method, or a number that is out of range.
    """

    method: str = DEFAULT
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
