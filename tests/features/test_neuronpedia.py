"""Neuronpedia's export against its own rules, restated here: required fields with their types, and what it refuses."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab_store
import numpy as np
import pytest

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.features import Creator, Notes, export_neuronpedia, make_label
from qwen_scope.features.notes import Label
from qwen_scope.stats import Interval

LAYER = lab_store.LAYER
BY = Creator("clx0user", "somebody", "Qwen")
METHODS = {"oai_token-act-pair", "oai_attention-head", "np_max-act-logits", "eleuther_acts_top20"}
NUMBER = (int, float)
REQUIRED: dict[str, dict[str, Any]] = {
    "release": {"name": str, "description": str, "creatorName": str, "creatorId": str},
    "model": {"id": str, "displayName": str, "creatorId": str, "layers": int, "neuronsPerLayer": int, "owner": str},
    "sourceset": {"modelId": str, "name": str, "creatorName": str, "creatorId": str, "releaseName": str},
    "source": {"id": str, "modelId": str, "setName": str, "creatorId": str, "hookName": str},
    "features": {"modelId": str, "layer": str, "index": str, "creatorId": str, "maxActApprox": NUMBER},
    "activations": {"id": str, "modelId": str, "layer": str, "index": str, "creatorId": str, "tokens": list,
                    "values": list, "maxValue": NUMBER, "maxValueTokenIndex": int},
    "explanations": {"id": str, "modelId": str, "layer": str, "index": str, "description": str, "authorId": str,
                     "typeName": str, "explanationModelName": str},
    "upload": {"modelId": str, "source": str, "features": list},
    "upload feature": {"index": int, "density": NUMBER, "topLogits": list, "bottomLogits": list,
                       "explanations": list, "activations": list},
    "upload activation": {"tokens": list, "values": list},
    "upload explanation": {"text": str, "methodName": str, "modelName": str},
}  # fmt: skip
"""Per record the fields that its upload route or its database wants, and their types."""


def rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of an export with its kind."""
    for name in ("release", "model", "sourceset", "source"):
        if (folder / f"{name}.jsonl").exists():
            yield name, json.loads((folder / f"{name}.jsonl").read_text())
    for name in ("features", "activations", "explanations"):
        for path in sorted((folder / name).glob("*.jsonl.gz")):
            for line in gzip.decompress(path.read_bytes()).decode().split("\n"):
                if line:
                    yield name, json.loads(line)
    for path in sorted((folder / "upload").iterdir()):
        body = json.loads(path.read_text())
        yield "upload", body
        for feature in body["features"]:
            yield "upload feature", feature
            yield from (("upload activation", one) for one in feature["activations"])
            yield from (("upload explanation", one) for one in feature["explanations"])


def problems(folder: Path) -> list[str]:
    """What Neuronpedia would refuse."""
    found = []
    for kind, row in rows(folder):
        for key, wanted in REQUIRED[kind].items():
            value = row.get(key)
            if not isinstance(value, wanted) or isinstance(value, bool) or value == "":
                found.append(f"{kind}: {key} is {value!r:.40}")
        if isinstance(row.get("tokens"), list):
            if not all(isinstance(token, str) and token for token in row["tokens"]):
                found.append(f"{kind}: an empty token")
            if len(row["tokens"]) != len(row["values"]) or not row["tokens"]:
                found.append(f"{kind}: {len(row['tokens'])} tokens, {len(row['values'])} values")
        for side in ("topLogits", "bottomLogits"):
            found += [f"{kind}: an empty token in {side}" for one in row.get(side, ()) if not one["token"]]
        if "embedding" in row and len(row["embedding"]) != 256:
            found.append(f"{kind}: an embedding of {len(row['embedding'])}")
        for key in ("methodName", "typeName"):
            if key in row and row[key] not in METHODS:
                found.append(f"{kind}: {key} is {row[key]!r}, which is not registered")
        for key in ("modelName", "explanationModelName"):
            if key in row and re.search(r"\d\.\d\d|detection|summary", row[key]):
                found.append(f"{kind}: {key} is {row[key]!r}, which is not registered")
        if "modelId" in row and row["modelId"] != row["modelId"].lower():
            found.append(f"{kind}: modelId {row['modelId']!r}")
        if kind == "model" and row["id"] != row["id"].lower():
            found.append(f"model: id {row['id']!r}")
        if any(key in row and row[key] is None for key in ("createdAt", "hookName")):
            found.append(f"{kind}: null")
    return found


def label(text: str, low: float) -> Label:
    return Label(text, Interval(low + 0.1, low, low + 0.2, 20), Interval(0.8, 0.7, 0.9, 20), "summary", "tokens")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A multilingual store of the lab: Chinese characters are two or three tokens each."""
    place = tmp_path_factory.mktemp("np")
    with FeatureStore(lab_store.copied(place)) as store:
        fires = np.flatnonzero(store.stats(LAYER)["tokens"].to_numpy())[:150].tolist()
        fingerprint = store.layer(LAYER).fingerprint
        Notes(store).add(make_label(LAYER, fires[0], fingerprint, label("greetings", 0.7)))
        Notes(store).add(make_label(LAYER, fires[1], fingerprint, label("full stops", 0.35)))
        made = export_neuronpedia(
            store, LAYER, place / "out", model_id="lab", set_name="ours", creator=BY, scope=lab_store.scope(),
            features=fires, contexts=5,
        )  # fmt: skip
        assert made == 150
        empty = store.sql("SELECT count(*) AS n FROM tokens WHERE text = ''")["n"][0].as_py()
        assert empty > 50, "the store has tokens that show nothing by themselves"
    return place / "out"


@pytest.mark.slow
def test_nothing_of_a_multilingual_export_is_refused(exported: Path) -> None:
    assert problems(exported) == []
    kinds = {kind for kind, _ in rows(exported)}
    assert kinds == set(REQUIRED), "every kind of record is there to be judged"


def test_the_rules_can_refuse(exported: Path, tmp_path: Path) -> None:
    """What the export wrote before: empty tokens and keys, scores in the method's name, an empty embedding."""
    (tmp_path / "upload").mkdir()
    token = {"tokens": ["a", ""], "values": [1.0, 0.0]}
    explained = {"text": "x", "methodName": "qwen-scope detection 0.48 fuzzing 0.50", "modelName": "summary"}
    feature = {"index": 1, "density": 0.1, "topLogits": [{"token": "", "value": 1.0}], "bottomLogits": [],
               "explanations": [explained], "activations": [token]}  # fmt: skip
    body = {"modelId": "Lab", "source": "5-x", "features": [feature]}
    (tmp_path / "upload" / "batch-0.json").write_text(json.dumps(body))
    (tmp_path / "release.jsonl").write_text(json.dumps({"name": "r", "description": "d"}))
    said = problems(tmp_path)
    for part in ("creatorName is None", "an empty token", "topLogits", "methodName", "modelName", "modelId 'Lab'"):
        assert any(part in one for one in said), part


def test_what_a_label_scored_stands_beside_the_files(exported: Path) -> None:
    lines = [json.loads(line) for line in (exported / "labels.jsonl").read_text().splitlines()]
    assert [(one["text"], one["at_chance"]) for one in lines] == [("greetings", False), ("full stops", True)]
    texts = [row["text"] for kind, row in rows(exported) if kind == "upload explanation"]
    assert texts == ["greetings", "[at chance] full stops"]
    model = next(row for kind, row in rows(exported) if kind == "model")
    config = lab_store.scope().model.config
    assert (model["layers"], model["neuronsPerLayer"]) == (config.num_hidden_layers, config.intermediate_size)


def test_without_a_creator_there_is_only_the_upload(tmp_path: Path) -> None:
    with FeatureStore(lab_store.folder()) as store:
        export_neuronpedia(
            store, LAYER, tmp_path / "n", model_id="lab", set_name="ours", features=range(40), contexts=2
        )
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == ["labels.jsonl", "upload"]
    assert problems(tmp_path / "n") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_id": "Qwen3-1.7B"}, "lower case: 'qwen3-1.7b', not 'Qwen3-1.7B'"),
        ({"model_id": " "}, "the model id is empty"),
        ({"set_name": ""}, "the set is empty"),
        ({"method": ""}, "the method is empty"),
        ({"explainer": " "}, "the explainer is empty"),
        ({"creator": BY}, "how many layers the model has"),
        ({"features": []}, "nothing that Neuronpedia takes"),
    ],
)
def test_what_it_would_refuse_is_refused_here(changes: dict, says: str, tmp_path: Path) -> None:
    with FeatureStore(lab_store.folder()) as store, pytest.raises(InputError, match=says):
        export_neuronpedia(
            store, LAYER, tmp_path / "n", **{"model_id": "lab", "set_name": "ours", "features": [3], **changes}
        )


@pytest.mark.parametrize("changes", [{"id": ""}, {"name": " "}, {"owner": ""}, {"layers": 0}, {"neurons": True}])
def test_an_empty_creator_is_refused(changes: dict) -> None:
    with pytest.raises(InputError):
        Creator(**{"id": "a", "name": "b", "owner": "c", **changes})


@pytest.mark.slow
def test_the_command_asks_for_all_of_a_creator(tmp_path: Path, capsys) -> None:
    base = ["export", str(lab_store.folder()), "--to", "neuronpedia", "--features", f"{LAYER}/0-9"]
    base += ["--model-id", "lab", "--no-model"]
    assert main([*base, "-o", str(tmp_path / "a"), "--creator-id", "u"]) == 2
    assert "--creator-id, --creator-name and --owner" in capsys.readouterr().err
    assert main([*base, "-o", str(tmp_path / "b")]) == 0
    assert "Only the upload" in capsys.readouterr().out
    full = ["--creator-id", "u", "--creator-name", "us", "--owner", "Qwen", "--model-layers", "6"]
    full += ["--model-neurons", "256", "--method", "np_max-act-logits", "--explainer", "gpt-4o"]
    assert main([*base, "-o", str(tmp_path / "c"), *full]) == 0
    assert problems(tmp_path / "c") == []
