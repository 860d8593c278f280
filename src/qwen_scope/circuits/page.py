"""A graph as one HTML file with a picture to click through: no server, no other file, light and dark."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files

from qwen_scope.errors import printable
from qwen_scope.report import Markup, element, html_table, join, visible

from .graph import Graph


def graph_html(graph: Graph) -> str:
    """The whole document. Its policy allows the one script that it holds, by hash, and no request."""
    home = files("qwen_scope.circuits")
    style, script = ((home / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    # `<` ends no script inside of one where it is escaped, and neither do the separators that JavaScript reads as lines
    data = json.dumps(graph.to_json(), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    title = f"Why: {graph.quantity}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        # its quotes and slashes are those of the policy's own grammar, which `element` would write as entities
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", visible(title)),
        element("style", Markup(style)),
    )
    sure = "" if graph.probability is None else f", probability {graph.probability:.3g}"
    top = element(
        "header",
        element("h1", visible(f"{graph.quantity} = {graph.value:.4g}{sure}")),
        element("p", visible(f"{graph.model}, {graph.group}; effects by {graph.method}"), class_="soft"),
        element(
            "p",
            element("label", element("input", type="checkbox", id="errors", checked=True), " errors "),
            element("label", element("input", type="checkbox", id="unfold"), " unfold ladders "),
            element("button", "unpin all", id="unpin"),
            element("span", " Hover a node for its edges, click to pin it, double-click to fold.", class_="soft"),
        ),
    )
    main = element("main", element("div", id="picture"), element("aside", id="details"))
    body = element(
        "body",
        top,
        main,
        element("footer", _shares(graph)),
        element("script", Markup(data), type="application/json", id="graph"),
        element("script", Markup(script)),
    )
    return printable("<!doctype html>\n" + element("html", head, body, lang="en") + "\n", keep="\n\t")


def _shares(graph: Graph) -> Markup:
    rows = [
        (layer, one.n_kept, one.n_left_out, f"{one.kept:.1%}", f"{one.left_out:.1%}", f"{one.errors:.1%}")
        for layer, one in graph.shares.items()
    ]
    columns = ("layer", "features", "left out", "effects kept", "of those left out", "through errors")
    said = f"{graph.edges_left_out:,} edges between these nodes are below the thresholds."
    said += (
        f" Replacement {graph.replacement:.2f}, completeness {graph.completeness:.2f}, as circuit-tracer defines them."
    )
    if graph.agreement is not None:
        n = sum(node.exact is not None for node in graph.nodes)
        pearson, spearman = graph.agreement
        said += f" Estimated against ablated effects of {n} features: Pearson {pearson:.2f}, Spearman {spearman:.2f}."
    return join(element("h2", "What is in the graph, by the size of effects"), html_table(columns, rows),
                element("p", said, class_="soft"))  # fmt: skip
