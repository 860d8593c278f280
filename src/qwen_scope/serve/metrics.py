"""What watches have counted, in vLLM's own `/metrics`: the workers count, and are asked when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY  # pyright: ignore[reportMissingImports]
from prometheus_client.core import CounterMetricFamily  # pyright: ignore[reportMissingImports]
from prometheus_client.registry import Collector  # pyright: ignore[reportMissingImports]

from .vllm_config import settings_of

PREFIX = "qwen_scope_watch"


class Watched(Collector):
    """`qwen_scope_watch_tokens`, `_firings` and `_alarms`, by watch, recipe and phase; counters since the start.

    The rate of firing is firings per token.
    """

    def __init__(self) -> None:
        self.counted: Mapping[str, Sequence[Sequence[Any]]] = {"tokens": (), "alarms": ()}

    def collect(self) -> Iterable[CounterMetricFamily]:
        """What Prometheus asks for."""
        by = ("watch", "recipe", "phase")
        tokens = CounterMetricFamily(f"{PREFIX}_tokens", "Tokens of which the rule of a watch was asked.", labels=by)
        firings = CounterMetricFamily(f"{PREFIX}_firings", "Tokens at which the rule of a watch held.", labels=by)
        for *labels, asked, held in self.counted["tokens"]:
            tokens.add_metric(labels, asked)
            firings.add_metric(labels, held)
        alarms = CounterMetricFamily(
            f"{PREFIX}_alarms", "Answers in which a watch raised its alarm.", labels=(*by, "then")
        )
        for *labels, raised in self.counted["alarms"]:
            alarms.add_metric(labels, raised)
        return tokens, firings, alarms


_WATCHED: list[Watched] = []


async def refresh(engine: Any) -> None:
    """Fetch the counts from the workers, whose ranks of tensor parallelism count the same."""
    if settings_of(engine.vllm_config) is None:
        return
    if not _WATCHED:
        _WATCHED.append(Watched())
        REGISTRY.register(_WATCHED[0])
    states = await engine.collective_rpc("qwen_scope_status")
    found = next((state["watched"] for state in states if state is not None), None)
    if found is not None:
        _WATCHED[0].counted = found
