"""From a graph to a recipe: its strongest features, to be added elsewhere or taken away here."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.errors import InputError
from qwen_scope.scope import Scope
from qwen_scope.steer import Intervention, Recipe

from .graph import Graph

FEATURES = 5


def graph_recipe(graph: Graph, scope: Scope, *, nodes: Sequence[int] | None = None, name: str = "") -> Recipe:
    """A recipe that adds features of a graph with the activation they have in the prompt, for `steer` and `validate`.

    A ladder is added once, at the node where its effect is largest; a feature that is active at several tokens with
    its largest activation.

    Args:
        nodes: which; by default the five ladders with the largest effects in favour of the quantity.

    Raises:
        InputError: a node that is no feature, or no feature that raises the quantity.
    """
    most = FEATURES if nodes is None else len(nodes)
    if nodes is None:
        seen: set[int] = set()
        chosen: list[int] = []
        for i in graph.features:
            ladder = graph.ladder_of[i].nodes
            if graph.nodes[i].effect > 0 and not seen & set(ladder):
                chosen.append(i)
                seen |= set(ladder)
        nodes = chosen
    largest: dict[tuple[int, int], float] = {}
    for i in nodes:
        node = graph.nodes[i] if 0 <= i < len(graph.nodes) else None
        if node is None or node.layer is None or node.feature is None or node.activation is None:
            raise InputError(f"node {i} is no feature of this graph; its features are {graph.features[:5]} and so on")
        key = (node.layer, node.feature)
        largest[key] = max(largest.get(key, 0.0), node.activation)
        if len(largest) == most:
            break
    if not largest:
        raise InputError(f"no feature of the graph raises the {graph.quantity}, so there is nothing to add")
    changes = [
        Intervention.add(layer=layer, feature=feature, amount=amount) for (layer, feature), amount in largest.items()
    ]
    found = f"from the graph of {graph.quantity} after {graph.prompt!r:.200}, by {graph.method}"
    effect = {"value": graph.value, "nodes": len(largest)}
    return Recipe.of(name or f"why {graph.quantity}", scope.model, changes, scope.saes, provenance=found, effect=effect)
