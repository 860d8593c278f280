"""`qwen-scope why` as it is typed: the terminal, the viewers' format, the page, the recipe, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwen_scope import load_scope
from qwen_scope.circuits.graph_file import pair
from qwen_scope.cli import main
from qwen_scope.errors import MismatchError, NotFoundError
from qwen_scope.features import Label, make_label
from qwen_scope.features import names_of as names_from
from qwen_scope.stats import Interval
from qwen_scope.steer import load_recipe

PROMPT = "Guten Morgen, wo ist"
LINK = {"type": "object", "required": ["source", "target", "weight"], "properties": {"weight": {"type": "number"}}}
NODE = {
    "type": "object",
    "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
    "properties": {
        "node_id": {"type": "string"},
        "feature": {"type": ["integer", "null"]},
        "layer": {"type": ["string", "integer"]},
        "ctx_idx": {"type": "integer"},
        "feature_type": {"enum": ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]},
        "jsNodeId": {"type": "string"},
        "clerp": {"type": "string"},
        "influence": {"type": ["number", "null"]},
        "activation": {"type": ["number", "null"]},
    },
}
NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt"],
            "properties": {
                "slug": NAME,
                "scan": NAME,
                "prompt_tokens": {"type": "array", "items": {"type": "string", "minLength": 1}},
                "prompt": {"type": "string"},
                "feature_details": {"properties": {"feature_json_base_url": {"type": "string"}}},
                "schema_version": {"const": 1},
            },
        },
        "qParams": {
            "type": "object",
            "properties": {"pinnedIds": {"type": "array"}, "supernodes": {"type": "array"}},
        },
        "nodes": {"type": "array", "items": NODE},
        "links": {"type": "array", "items": LINK},
    },
}
"""What the viewers' schema (version 1) demands of a graph, restated, with what is known of names and kinds."""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["why", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.slow
def test_the_graph_fits_the_viewers_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, PROMPT, "--nodes", "40", "--exact", "0", "--json")
    assert code == 0
    graph = json.loads(out)
    jsonschema.validate(graph, SCHEMA)
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(ids)
    features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(features) == 40
    for node in features:
        layer, index, position = map(int, node["node_id"].split("_"))
        assert (node["layer"], node["ctx_idx"]) == (str(layer), position)
        # the inverse of Cantor's pairing, from its formula
        diagonal = int(((8 * node["feature"] + 1) ** 0.5 - 1) / 2)
        assert node["feature"] - diagonal * (diagonal + 1) // 2 == index
        assert diagonal - index == layer
    (answer,) = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert re.fullmatch(r'Output ".+" \(p=0\.\d{3}\)', answer["clerp"])
    assert answer["layer"] == "7", "the lab has six layers"
    assert sorted(node["influence"] for node in features)[-1] == pytest.approx(1)


@pytest.mark.slow
def test_everything_is_written_beside(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {name: tmp_path / f"why.{kind}" for name, kind in (("html", "html"), ("graph", "json"), ("recipe", "yaml"))}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    code, out, _ = run(capsys, PROMPT, "--token", " der", "--against", " the", "--nodes", "30", *options)
    assert code == 0
    assert "logit of ' der' less ' the'" in out
    assert "ablated" in out
    graph = json.loads(files["graph"].read_text(encoding="utf-8"))
    base = tmp_path / graph["metadata"]["feature_details"]["feature_json_base_url"]
    feature = next(node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder")
    data = json.loads((base / f"{feature['feature']}.json").read_text(encoding="utf-8"))
    example = data["examples_quantiles"][0]["examples"][0]
    assert len(example["tokens"]) == len(example["tokens_acts_list"]) == len(graph["metadata"]["prompt_tokens"])
    assert example["tokens_acts_list"][feature["ctx_idx"]] == pytest.approx(feature["activation"])
    assert len(data["top_logits"]) == len(data["bottom_logits"]) == 10
    recipe = load_recipe(files["recipe"])
    named = {(one.layer, one.feature) for one in recipe.interventions}
    assert {pair(layer, feature) for layer, feature in named if feature is not None} <= {
        node["feature"] for node in graph["nodes"]
    }
    page = files["html"].read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", page), "nothing is fetched"
    assert page.count("<script") == 2


@pytest.mark.slow
def test_a_text_can_not_leave_its_place_in_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "why.html"
    hostile = "</script><script>alert(1)</script>"
    assert run(capsys, f"Hello {hostile} there", "--nodes", "5", "--exact", "0", "--html", str(file))[0] == 0
    page = file.read_text(encoding="utf-8")
    assert page.count("</script") == 2
    assert hostile not in page


@pytest.mark.slow
def test_another_feature_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", PROMPT, "--layers", "4", "--top", "1", "--json"]) == 0
    last = json.loads(capsys.readouterr().out)["tokens"][-1]["layers"]["4"][0]["feature"]
    code, out, _ = run(capsys, PROMPT, "--of", f"4/{last}", "--nodes", "20")
    assert code == 0
    assert f"activation of 4/{last}" in out


def test_nodes_have_their_labels_in_text_page_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scope = load_scope("lab", device="cpu")
    sure, fingerprint = Interval(0.9, 0.8, 1.0, 20), scope.saes[4].identity.fingerprint
    weak, good = (Label(text, sure, sure, by, by) for text, by in (("tokens", "summary"), ("articles", "model")))
    file, page, graph = (tmp_path / name for name in ("labels.jsonl", "why.html", "why.json"))
    notes = [make_label(4, 283, fingerprint, one) for one in (weak, good, weak)]
    file.write_text("".join(json.dumps(note.to_json()) + "\n" for note in notes))
    written = ["--labels", str(file), "--html", str(page), "--graph", str(graph)]
    code, out, _ = run(capsys, PROMPT, "--token", " der", "--nodes", "12", "--exact", "0", *written)
    assert code == 0
    assert "articles (0.90)" in out
    assert "articles (0.90)" in page.read_text(encoding="utf-8")
    said = {one["clerp"] for one in json.loads(graph.read_text())["nodes"] if one["node_id"].startswith("4_283_")}
    assert said == {"4/283 articles (0.90)"}
    file.write_text(json.dumps(make_label(4, 283, "0" * 64, good).to_json()) + "\n")
    with pytest.raises(MismatchError, match=r"no label in .* is about an SAE of"):
        names_from(scope, file)
    with pytest.raises(NotFoundError, match="there are no labels in"):
        names_from(scope, tmp_path / "none")


BAD = [
    (["--token", "Donaudampfschiff"], r"'Donaudampfschiff' is \d tokens to this model .*; name one token"),
    (["--token", ""], r"'' is not in the vocabulary"),
    (["--against", " der", "--token", " der"], "the same; name two different"),
    (["--position", "99"], r"position 99 does not exist: the prompt has \d tokens"),
    (["--position", "-99"], "position -99 does not exist"),
    (["--layers", "9"], "has no SAE for layer 9; it has layers 0-5"),
    (["--method", "magic"], "a method is one of gradient, ig, relp, joint, exact, not 'magic'"),
    (["--of", "4/99999"], "a feature must be a whole number between 0 and 2047"),
    (["--of", "0/3"], "no layer below 0"),
    (["--of", "4/3", "--token", " der"], "leave out --token"),
    (["--of", "4"], "4"),
    (["--log-prob", "--against", " der"], "leave out --log-prob"),
    (["--node-share", "2"], r"the node share must be a finite number between 0 and 1"),
    (["--recipe", "why.txt"], "ends in .json or .yaml"),
    (["--position", "0"], r"no feature of this prompt can be a node: no token counts for the SAEs \(first\); give a"),
    (["--positions", "0"], r"no feature of this prompt can be a node: no token counts for the SAEs \(first, not"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, PROMPT, "--model", "lab", *argv)
    assert (code, out) == (2, "")
    assert re.search(says, err), err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is half-written"
