"""`qwen-scope why`: from features to features to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.circuits import Question, WhyOptions
from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

from . import options, output
from .groups import OPTIONS, grouped

if TYPE_CHECKING:
    from qwen_scope.circuits import Graph
    from qwen_scope.circuits import Path as Way

SCOPE, QUESTION, WHY = ScopeOptions(), Question(), WhyOptions()

OPTIONS[Question] = {
    "token": Annotated[
        str | None, typer.Option("--token", help='The token to explain, such as " Paris". Default: the most likely.')
    ],
    "against": Annotated[str | None, typer.Option("--against", help="Explain the difference of logits to this token.")],
    "of": Annotated[str | None, typer.Option("--of", help="Explain a feature's activation instead: LAYER/FEATURE.")],
    "log_prob": Annotated[bool, typer.Option("--log-prob", help="Of the token, its log-probability.")],
    "position": Annotated[int, typer.Option("--position", help="Of the token before the answer; -1 is the last.")],
}
OPTIONS[WhyOptions] = {
    "method": Annotated[str, typer.Option("--method", help="Of the effects: gradient, relp, ig, joint or exact.")],
    "steps": Annotated[
        int, typer.Option("--steps", help="Points of the way of joint, and of a piece of that of ig.", min=1)
    ],
    "nodes": Annotated[int, typer.Option("--nodes", help="At most as many features in the graph.", min=1)],
    "node_share": Annotated[
        float, typer.Option("--node-share", help="Of each layer's effects, the share that is enough.")
    ],
    "edges": Annotated[int, typer.Option("--edges", help="At most as many edges.", min=1)],
    "edge_share": Annotated[
        float, typer.Option("--edge-share", help="Least share of what a node takes in, for an edge.")
    ],
    "exact": Annotated[int, typer.Option("--exact", help="Nodes whose effect is measured by ablation.", min=0)],
}


@grouped
def why(
    prompt: Annotated[str, typer.Argument(help="The text; '-' reads standard input.")],
    asked: ScopeOptions = SCOPE,
    question: Question = QUESTION,
    layers: options.Layers = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="Tokens whose features are nodes, as in 0,5-8. Default: all.")
    ] = None,
    how: WhyOptions = WHY,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", help="A store with labels, or what 'label --export' wrote. Default: those beside the SAEs."
        ),
    ] = None,
    paths: Annotated[int, typer.Option("--paths", help="Paths to print.", min=1)] = 5,
    chat: options.Chat = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file with the graph.")] = None,
    graph_file: Annotated[
        Path | None,
        typer.Option("--graph", help="Write the graph for circuit-tracer's viewers, with its features' files beside."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Write a recipe (.json, .yaml) that adds the strongest features.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Explain the next token: the features it hangs on, layer by layer, and what they are made of.

    Effects are estimates; those of the strongest nodes are compared with ablation. --json prints the graph in the
    format of circuit-tracer, which Neuronpedia renders. A recipe goes to: qwen-scope steer --recipe
    """
    from qwen_scope.circuits import ask, explain, graph_document, graph_recipe, read, save_graph, text_by
    from qwen_scope.features import names_of
    from qwen_scope.files import check_output, write_text

    wanted, mode = options.parse_layers(layers), options.check_chat(chat)
    chosen = None if positions is None else options.parse_numbers("--positions", positions)
    text = options.typed_or_piped(prompt)
    for file in (html, graph_file, recipe):
        if file is not None:
            check_output(file, *options.folders_of(asked))
    if recipe is not None and recipe.suffix not in options.RECIPES:
        raise InputError(f"--recipe ends in .json or .yaml, not {recipe.name!r}")
    scope = options.open_asked(asked)
    with output.status("tracing"):
        found = ask(scope, text, question, chat=mode)
        reading = read(scope, found.ids, found.quantity, wanted, tokens=found.tokens, positions=chosen)
        graph = explain(reading, how, labels=names_of(scope, labels))
    if html is not None:
        from qwen_scope.circuits import graph_html

        write_text(html, graph_html(graph))
    if graph_file is not None:
        save_graph(graph, scope, graph_file)
    if recipe is not None:
        graph_recipe(graph, scope).save(recipe)
    if as_json:
        output.print_json(graph_document(graph, text_by(scope)), named=False)  # names are its `clerp`
    else:
        print_graph(graph, paths)
    for file in (html, graph_file, recipe):
        if file is not None:
            output.say(f"{file} written")


def print_graph(graph: Graph, n: int) -> None:
    """What is explained, the paths that carry most, the strongest features, and what the graph leaves out."""
    out = output.console()
    sure = "" if graph.probability is None else f", probability {graph.probability:.3g}"
    title = f"{graph.quantity} after {graph.tokens[-1]!r}: {graph.value:.4g}{sure}"
    out.print(title, style="bold")
    rows = []
    seen: set[int] = set()
    for i in graph.features:
        node, ladder = graph.nodes[i], graph.ladder_of[i]
        if i in seen:
            continue
        seen.update(ladder.nodes)
        exact = "" if node.exact is None else f"{node.exact:+.3g}"
        written = graph.written_by(ladder)
        rows.append((name_of(graph, i), place_of(graph, i), f"{node.effect:+.3g}", exact, written, says(graph, i)))
        if len(rows) == 2 * n:
            break
    columns = ("feature", "token", "effect", "ablated", "written by", "label or promotes")
    output.show(f"Features with the largest effects ({graph.method})", columns, rows)
    if found := graph.paths(n):
        rows = [(f"{path.weight:+.3g}", way(graph, path)) for path in found]
        output.show("How the strongest come about (and the share that each step gives)", ("writes", "path"), rows)
    shares = [
        (layer, one.n_kept, one.n_left_out, f"{one.kept:.0%}", f"{one.left_out:.0%}", f"{one.errors:.0%}")
        for layer, one in graph.shares.items()
    ]
    columns = ("layer", "features", "left out", "effects kept", "of those left out", "through errors")
    output.show("What is in the graph, by the size of effects", columns, shares)
    out.print(
        f"Replacement {graph.replacement:.2f}, completeness {graph.completeness:.2f} (as circuit-tracer defines them)."
    )
    if graph.agreement is not None:
        pearson, spearman = graph.agreement
        checked = sum(node.exact is not None for node in graph.nodes)
        out.print(
            f"Estimated against ablated effects of {checked} features: Pearson {pearson:.2f}, Spearman {spearman:.2f}."
        )


def name_of(graph: Graph, i: int) -> str:
    """A feature with the layers its ladder spans, such as `3/17 (layers 3-5)`."""
    ladder = graph.ladder_of[i].nodes
    first, last = graph.nodes[ladder[0]], graph.nodes[ladder[-1]]
    name = graph.nodes[i].name
    if len(ladder) == 1:
        return name
    return f"{name} (layers {first.layer}-{last.layer})"


def place_of(graph: Graph, i: int) -> str:
    """The token of a node with its position."""
    from qwen_scope.report import visible

    position = graph.nodes[i].position
    return f"{position}:{visible(graph.tokens[position])}"


def says(graph: Graph, i: int) -> str:
    """A node's label, or the tokens that it promotes."""
    from qwen_scope.report import visible

    node = graph.nodes[i]
    return node.label or " ".join(visible(token) for token in node.promotes)


def way(graph: Graph, path: Way) -> str:
    """A path in one line."""
    parts = []
    for i, share in zip(path.nodes[:-1], path.shares, strict=True):
        if graph.nodes[i].kind == "embedding":
            parts.append(f"{place_of(graph, i)} →({share:.0%})")
        else:
            parts.append(f"{name_of(graph, i)} at {place_of(graph, i)} [{says(graph, i)}] →({share:.0%})")
    return " ".join([*parts, "the answer" if graph.answer else graph.quantity])
