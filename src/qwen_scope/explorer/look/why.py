"""What the Why tab shows, as markup: the page of a graph, as `qwen-scope why --html` writes it, inside this one."""

from __future__ import annotations

from qwen_scope.circuits import Graph, graph_html
from qwen_scope.report import Markup, element

from .components import Named


def graph_panel(graph: Graph) -> Markup:
    """The whole page of the graph in a frame that runs its own script and reaches nothing of this page."""
    return element(
        "iframe", srcdoc=graph_html(graph), sandbox="allow-scripts", class_="qs-frame", title=f"Why: {graph.quantity}"
    )


def label_of(named: Named | None) -> str:
    """A feature's label with its score, as text; a label is never shown without it, and the graph tells what a feature
    promotes by itself."""
    return "" if named is None or named.score is None else f"{named.text} ({named.score:.2f})"
