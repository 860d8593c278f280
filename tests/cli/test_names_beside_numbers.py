"""Wherever a command prints the number of a feature that has a name, the name stands beside it.

Each command runs on the lab, whose SAEs have labels for some hundred features: as a table, as JSON, and into a file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lab_store
import pytest
from typed import COMMANDS, LEAVES

from qwen_scope.cli import main, names
from qwen_scope.cli.evaluate import show_moves
from qwen_scope.cli.validate import print_verdict
from qwen_scope.features import names_of, names_of_saes
from qwen_scope.lab import documents
from qwen_scope.report import Table

CHOSEN = "4/283"
"""A feature of the lab with a name, which is at work on German."""

LINES = {
    "features": [
        'features "Wie geht es dir? Wo ist der Markt?" --layers 3,4 --top 8',
        'features "Wie geht es dir?" --chat non_thinking --response "Halt die Klappe, du Esel!" --layers 4',
        f'features "{"Wie geht es dir? " * 45}" --layers 4 --top 5',
    ],
    "compare": ['compare "Where is the station?" "Wo ist der Bahnhof?" --drop-common --layers 4,5'],
    "find": [
        "find --positive lab:language=de --negative lab:language=fr --documents 8 --layers 4 -n 60 --level 0.2",
        "find STORE --positive language=de --layers 2 -n 40",
        "find STORE --groups language --layers 2 -n 9",
        "find STORE --repetition all --layers 2 -n 40 --level 0.9",
        "find --promotes der --layers 3,4 -n 90",
        "find --near 5/678 -n 20",
        "find STORE --near 5/678 -n 400",
    ],
    "show": [f"show --feature {CHOSEN} -n 3", "show --feature 5/678 -n 60"],
    "store show": ["store STORE --layer 2 -n 40", "store STORE --feature 2/NAMED"],
    "card": ["card STORE 2/NAMED -n 40"],
    "match": ["match lab lab --layer 4 --other-layer 5 -n 300"],
    "why": ['why "Guten Morgen, wo ist" --token " der" --against " the" --layers 3-5'],
    "steer": [f'steer "[12:30] Anna: " --feature {CHOSEN} --amount 0.3 --max-new-tokens 2'],
    "sweep": [f"sweep PROMPTS --feature {CHOSEN} --target-feature 4/283 --amounts 0.5 --max-new-tokens 2"],
}

# What prints no feature by its number, or nothing but what was typed.
NONE = {
    "catalog", "plan", "convert", "extract", "lab examples", "lab texts", "lab build", "lab panel", "lens fit",
    "store merge", "train", "score", "synthesize", "export", "posttrain sft", "posttrain eval", "posttrain rl",
    "classify distil", "analyze redundancy", "analyze overlap", "analyze subset",
}  # fmt: skip
# Those whose output has another form, which have tests of their own below.
OTHERS = {"eval", "validate", "classify fit", "classify predict", "posttrain prepare"}
# Those whose tables have columns of names themselves, or pass through the same functions after minutes of work.
OWN = {
    "label", "analyze clusters", "analyze drift", "classify transfer", "demo", "lab card", "posttrain repetition",
    "explore", "serve",
}  # fmt: skip


@pytest.fixture(scope="module")
def called() -> names.Names:
    return names_of_saes("lab")


def argv(line: str, tmp_path: Path, called: names.Names) -> list[str]:
    """A line with the files it names, and a feature with a name."""
    german, others = tmp_path / "german.txt", tmp_path / "others.txt"
    german.write_text("Wo ist der Markt?\nWie geht es dir?\nIch bin sehr klug.\n", encoding="utf-8")
    others.write_text("Where is the market?\nHow are you?\nI am very clever.\n", encoding="utf-8")
    feature = next(str(f) for f in range(2048) if called(2, f))
    known = {
        "STORE": str(lab_store.folder()),
        "PROMPTS": str(german),
        "OTHERS": str(others),
        "2/NAMED": f"2/{feature}",
    }
    return [known.get(word, word) for word in shlex.split(line)]


def places(data: Any, layer: int | None = None) -> Iterator[tuple[int, int, dict]]:
    """Layer, feature and object of each feature in a JSON document."""
    if isinstance(data, dict):
        here = data.get("layer", layer)
        if isinstance(data.get("feature"), int) and isinstance(here, int):
            yield here, data["feature"], data
        for key, value in data.items():
            yield from places(value, int(key) if key.isdecimal() else here)
    elif isinstance(data, list):
        for one in data:
            yield from places(one, layer)


@pytest.mark.parametrize("line", [pytest.param(line, id=line[:40]) for lines in LINES.values() for line in lines])
def test_a_name_stands_beside_every_number(line: str, tmp_path: Path, called, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    words = argv(line, tmp_path, called)
    if words[0] == "store":  # its layer is that of the option
        layer = next((int(words[i + 1]) for i, word in enumerate(words) if word == "--layer"), None)
    else:
        layer = None
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    found = json.loads(printed)
    if words[0] != "why":  # the format of another tool, with names of its own
        for at, feature, one in places(found, layer):
            assert one.get("name", "") == called(at, feature), one
    some = any(called(at, feature) for at, feature, _ in places(found, layer))
    assert some or "names" in printed or words[0] == "why", "the line shows a feature with a name"

    out = tmp_path / "rows.json"
    assert main([*words, "--out", str(out)]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    known = dict[str, None]()
    for path in tmp_path.glob("rows*.json"):
        for row in json.loads(path.read_text(encoding="utf-8")):
            at, feature = row.get("layer", layer), row.get("feature")
            if isinstance(at, int) and isinstance(feature, int):
                assert (row.get("name") or "") == called(at, feature), row
                known |= dict.fromkeys([called(at, feature)] if called(at, feature) else [])
    assert any(one in text for one in known) or not known or (words[0] == "find" and "Nothing is significant" in text)
    if words[0] in ("steer", "sweep", "show") and CHOSEN in words:
        assert called(4, 283) in text


def test_what_takes_minutes_prints_its_features_with_names(capsys, monkeypatch) -> None:
    """Features that move on another checkpoint (`eval --post`) or on unrelated text (`validate`)."""
    monkeypatch.setenv("COLUMNS", "300")
    figures = dict.fromkeys(("rate_base", "rate_post", "mean_base", "mean_post", "q_rate", "q_mean"), 0.5)
    moves = {"moved": 1, "tested": 2, "features": [{"feature": 8, **figures}]}
    fits = {"layers.5.resid_post": {"moves": moves}}
    other = SimpleNamespace(layer=5, feature=8, before=0, after=1)
    side = SimpleNamespace(kl=0, kl_of_direction=0, loss=0, moved=[other])
    verdict: Any = SimpleNamespace(outcome="causal", reasons=(), conditions=(), shuffled=(), side=side)
    with names.fresh():
        names.know(lambda layer, feature: "eight" if (layer, feature) == (5, 8) else "")
        show_moves(fits)
        moved = capsys.readouterr().out
        print_verdict(verdict)
        tested = capsys.readouterr().out
        assert names.within(fits)["layers.5.resid_post"]["moves"]["features"][0]["name"] == "eight"
    assert "eight" in next(line for line in moved.splitlines() if "layers.5.resid_post" in line)
    assert "eight" in tested


def test_a_classifier_says_what_its_features_are_called(tmp_path: Path, called, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    codes = ("de", "en", "fr", "es")
    rows = [{"text": one.text, "language": one.language} for one in documents(n=40, seed=3, languages=codes)]
    table, rule, judged = tmp_path / "table.jsonl", tmp_path / "rule.json", tmp_path / "judged.json"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fit = ["classify", "fit", str(table), "--label", "language=de", "--layers", "4", "--top", "60"]
    assert main([*fit, "--rule", str(rule), "--out", str(judged), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)["rule"]["features"]
    assert any(called(4, one["feature"]) for one in found), "the rule has a feature with a name"
    for one in found:
        assert one.get("name", "") == called(4, one["feature"])
    because = "".join(row["de_because"] or "" for row in json.loads(judged.read_text(encoding="utf-8")))
    assert any(f"4/{one['feature']} {one['name']} on " in because for one in found if "name" in one)
    assert main([*fit, "--out", str(tmp_path / "report")]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for one in found:
        assert one.get("name", "") in printed
        assert escape(one.get("name", "")) in page

    out = tmp_path / "answers.jsonl"
    assert main(["classify", "predict", str(rule), str(table), "--out", str(out)]) == 0
    assert main(["classify", "predict", str(rule), str(table)]) == 0
    written, told = out.read_text(encoding="utf-8").splitlines(), capsys.readouterr().out.splitlines()
    assert list(map(json.loads, written)) == list(map(json.loads, told))
    evidence = [one for line in told for one in json.loads(line)["because"]]
    assert any("name" in one for one in evidence)
    for one in evidence:
        assert one.get("name", "") == called(4, one["feature"])


def test_an_alpha_table_is_shown_with_names(tmp_path: Path, called, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    pytest.importorskip("trl")
    table = tmp_path / "groups.jsonl"
    rows = [{"text": one.text, "group": one.language} for one in documents(n=12, seed=3, languages=("de", "en"))]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = ["posttrain", "prepare", str(table), "--target", "de", "--layers", "4", "--features", "60"]
    assert main([*line, "-o", str(tmp_path / "a.json"), "--json"]) == 0, capsys.readouterr().err
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    said = [called(4, feature) for feature in layer["features"]]
    assert any(said)
    assert layer["names"] == [one or None for one in said]
    assert main([*line, "-o", str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert all(one in printed for one in said)


def test_every_command_is_named_here() -> None:
    assert LINES.keys() | NONE | OTHERS | OWN == set(LEAVES), "say of a new command whether it prints features"
    assert not LINES.keys() & (NONE | OTHERS | OWN)
    assert all(path in COMMANDS for path in LINES)


def test_what_holds_features_gets_names() -> None:
    say = {(4, 7): "seven", (5, 8): "eight"}
    with names.fresh():
        names.know(lambda layer, feature: say.get((layer, feature), ""))
        columns, rows = names.beside(
            ("hook point", "feature", "rate"), [("layers.4.resid_post", 7, 0.1), ("x", 7, 0.2)]
        )
        assert columns == ("hook point", "feature", "rate", "name")
        assert rows == [("layers.4.resid_post", 7, 0.1, "seven"), ("x", 7, 0.2, None)]
        columns, rows = names.beside(("layer", "feature"), [(4, 8), (None, 7)])
        assert rows == [(4, 8, None), (None, 7, "seven")], "a layer stands in the first of its rows alone"
        assert names.beside(("layer/feature", "cosine"), [("5/8", 1.0)])[1] == [("5/8", 1.0, "eight")]
        assert names.beside(("feature", "max"), [(7, 1.0)])[0] == ("feature", "max"), "no layer, no name"
        assert names.beside(("feature", "max"), [(7, 1.0)], 4)[1] == [(7, 1.0, "seven")]
        assert names.beside(("feature", "name"), [("4/7", "mine")])[1] == [("4/7", "mine")]
        fits = {"fits": {"layers.5.resid_post": {"moves": {"features": [{"feature": 8, "rate": 1.0}]}}}}
        assert names.within(fits)["fits"]["layers.5.resid_post"]["moves"]["features"][0]["name"] == "eight"
        assert names.within({"layer": 4, "features": [7, 8]}) == {
            "layer": 4,
            "features": [7, 8],
            "names": ["seven", None],
        }
        assert names.within({"layer": "4", "feature": 7}) == {"layer": "4", "feature": 7}, "another tool's format"
        assert names.within([{"feature": True, "layer": 4}]) == [{"feature": True, "layer": 4}]
    assert names.within({"layer": 4, "feature": 7}) == {"layer": 4, "feature": 7}, "forgotten with the command"


def test_a_file_has_one_table_whether_or_not_all_layers_have_names(tmp_path: Path, capsys) -> None:
    out = tmp_path / "seen.csv"
    assert main(["features", "Wie geht es dir?", "--layers", "4,5", "--top", "2", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["seen.csv"]
    table = Table("t", ("feature", "name"), [(1, None), (2, None)])
    assert names.dropped(table).columns == ("feature",)


def test_names_of_a_store(called) -> None:
    from qwen_scope import FeatureStore
    from qwen_scope.features import names_of_store

    with FeatureStore(lab_store.folder()) as store:
        of_store, of_scope = names_of_store(store), names_of(lab_store.scope())
        for layer in store.layers:
            for feature in range(2048):
                assert of_store(layer, feature) == of_scope(layer, feature) == called(layer, feature)
