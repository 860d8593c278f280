"""A graph in the format of circuit-tracer (schema version 1), which Neuronpedia renders, and its features' files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.features import token_effects
from qwen_scope.files import write_text
from qwen_scope.scope import Scope
from qwen_scope.text import token_text

from .graph import Graph, Node

GENERATOR = {"name": "qwen-scope"}
# The only kind of feature that the viewers score and pin.
FEATURE_TYPE = "cross layer transcoder"


SHOWN = 10
"""Tokens that a feature's file says it promotes, and as many that it demotes."""


def save_graph(graph: Graph, scope: Scope, path: str | os.PathLike[str]) -> None:
    """Write a graph as one file, and its features' files into the folder `NAME-features` beside it.

    The graph is written last, when all that it names is there.

    Raises:
        InputError: a file that can't be written.
    """
    shown = {}
    for i in graph.features:
        node = graph.nodes[i]
        assert node.layer is not None, "of a feature"
        assert node.feature is not None, "of a feature"
        promoted, demoted = token_effects(scope, node.layer, node.feature, SHOWN)
        shown[i] = ([one.text for one in promoted], [one.text for one in demoted])
    file = Path(path)
    folder = file.with_name(f"{file.stem}-features")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in feature_documents(graph, shown).items():
        write_text(folder / name, json.dumps(data, ensure_ascii=False))
    made = graph_document(graph, text_by(scope), base_url=folder.name)
    write_text(file, json.dumps(made, ensure_ascii=False, allow_nan=False))


def text_by(scope: Scope) -> Callable[[int], str]:
    """What shows a token's id as text."""
    return lambda token: token_text(scope.tokenizer, token)


def graph_document(
    graph: Graph, text_of: Callable[[int], str], *, slug: str | None = None, scan: str | None = None, base_url: str = ""
) -> dict[str, Any]:
    """The graph as the schema has it: nodes, links, and ladders as supernodes.

    Influence is the share of the size of all effects that a feature and those above it carry together, so that a
    viewer's threshold keeps the largest.

    Args:
        text_of: shows a token's id as text.
        slug: the graph's name; by default of the prompt's words.
        scan: the model's name; by default the graph's.
        base_url: where the features' files of `feature_documents` will be served.
    """
    ids = node_ids(graph)
    influence = _influence(graph)
    nodes = [_node(graph, i, ids[i], influence.get(i), text_of) for i in range(len(graph.nodes))]
    links = [{"source": ids[one.source], "target": ids[one.target], "weight": one.weight} for one in graph.edges]
    supernodes = [
        [_clerp(graph.nodes[one.nodes[0]]), *(ids[i] for i in one.nodes)] for one in graph.ladders if len(one.nodes) > 1
    ]
    info = {"description": f"{graph.quantity} = {graph.value:.4g}; method {graph.method}", "generator": GENERATOR}
    metadata: dict[str, Any] = {
        "slug": slug or plain_name("-".join(graph.prompt.split()[:6])),
        "scan": scan or plain_name(graph.model),
        "prompt_tokens": [token or "�" for token in graph.tokens],
        "prompt": graph.prompt,
        "schema_version": 1,
        "info": info,
        "generation_settings": {"max_feature_nodes": len(graph.features)},
    }
    if base_url:
        metadata["feature_details"] = {"feature_json_base_url": base_url}
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def feature_documents(
    graph: Graph, shown: Mapping[int, tuple[Sequence[str], Sequence[str]]]
) -> dict[str, dict[str, Any]]:
    """By file name, what the viewers show of each feature of a graph.

    Args:
        shown: by node, the tokens that it promotes and demotes.
    """
    out = {}
    for i in graph.features:
        node = graph.nodes[i]
        assert node.layer is not None, "of a feature"
        assert node.feature is not None, "of a feature"
        number = pair(node.layer, node.feature)
        fires = dict(node.fires)
        values = [fires.get(position, 0.0) for position in range(len(graph.tokens))]
        example = {"tokens": [token or "�" for token in graph.tokens], "tokens_acts_list": values}
        out[f"{number}.json"] = {
            "index": number,
            "examples_quantiles": [{"quantile_name": "This prompt", "examples": [example]}],
            "top_logits": list(shown[i][0]),
            "bottom_logits": list(shown[i][1]),
        }
    return out


def pair(layer: int, feature: int) -> int:
    """The number of a feature over all layers: the Cantor pair of layer and index."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def plain_name(text: str) -> str:
    """A name of the letters that the format allows, `[A-Za-z0-9_.-]`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:80] or "prompt"


def node_ids(graph: Graph) -> list[str]:
    """The format's name of every node, each once.

    Those of errors, `0_{layer}_{position}`, are those of features of layer 0 with a small index; where both are in the
    graph the error's is marked.
    """
    found: list[str] = []
    features = {f"{one.layer}_{one.feature}_{one.position}" for one in graph.nodes if one.kind == "feature"}
    for node in graph.nodes:
        if node.kind == "feature":
            found.append(f"{node.layer}_{node.feature}_{node.position}")
        elif node.kind == "error":
            name = f"0_{node.layer}_{node.position}"
            found.append(f"{name}_error" if name in features else name)
        elif node.kind == "embedding":
            found.append(f"E_{graph.ids[node.position]}_{node.position}")
        else:
            found.append(f"{graph.n_layers + 1}_{graph.answer[0] if graph.answer else 0}_{node.position}")
    return found


def _node(graph: Graph, i: int, name: str, influence: float | None, text_of: Callable[[int], str]) -> dict[str, Any]:
    node = graph.nodes[i]
    made: dict[str, Any] = {"node_id": name, "ctx_idx": node.position, "activation": node.activation}
    made |= {"influence": influence, "effect": node.effect, "exact_effect": node.exact}
    if node.kind == "feature":
        assert node.layer is not None, "of a feature"
        assert node.feature is not None, "of a feature"
        made |= {"feature": pair(node.layer, node.feature), "layer": str(node.layer), "feature_type": FEATURE_TYPE}
        made |= {"jsNodeId": f"{node.layer}_{node.feature}-0", "clerp": _clerp(node)}
    elif node.kind == "error":
        made |= {"feature": -1, "layer": str(node.layer), "feature_type": "mlp reconstruction error"}
        made |= {"jsNodeId": f"{node.layer}_{node.position}-0", "clerp": ""}
    elif node.kind == "embedding":
        word = graph.ids[node.position]
        made |= {"feature": node.position, "layer": "E", "feature_type": "embedding"}
        made |= {"jsNodeId": f"E_{word}-{node.position}", "clerp": f'Emb: "{graph.tokens[node.position]}"'}
    else:
        word = graph.answer[0] if graph.answer else 0
        layer = str(graph.n_layers + 1)
        said = f'Output "{text_of(word)}" (p={graph.probability:.3f})' if graph.answer else f"Output {graph.quantity}"
        made |= {"feature": word, "layer": layer, "feature_type": "logit", "jsNodeId": f"{layer}_{word}-0"}
        made |= {"clerp": said, "is_target_logit": True, "token_prob": graph.probability or 0.0}
    return made


def _clerp(node: Node) -> str:
    """A feature's number with its label, or with the tokens that it promotes."""
    if node.label:
        return f"{node.name} {node.label}"
    return f"{node.name} promotes {' '.join(map(repr, node.promotes))}" if node.promotes else node.name


def _influence(graph: Graph) -> dict[int, float]:
    ranked = graph.features
    total = sum(abs(graph.nodes[i].effect) for i in ranked)
    found, carried = {}, 0.0
    for i in ranked:
        carried += abs(graph.nodes[i].effect)
        found[i] = carried / total if total else 1.0
    return found
