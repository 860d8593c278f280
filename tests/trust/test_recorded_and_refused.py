"""`validate --record` to the card, and what `card`, `match`, `score`, `label` and `validate` refuse: one sentence each,
and exit code 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from qwen_scope import FeatureStore, save_sae
from qwen_scope.cli import main
from qwen_scope.features import Notes
from qwen_scope.sae import Identity
from qwen_scope.trust import faithfulness

WHERE = ["--model", str(tiny.folder() / "model"), "--device", "cpu"]
SAE = ["--sae", str(tiny.folder() / "sae")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two SAEs of the tiny model, and of other documents; a narrower SAE; texts for validate."""
    out = tmp_path_factory.mktemp("recorded")
    rows = [{"text": f"{text} {i}", "n": str(i % 2)} for i in range(8) for text in tiny.TEXTS]
    (out / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out / "d.jsonl").write_text(json.dumps({"text": "Other words."}) + "\n", encoding="utf-8")
    for layer in (0, 2):
        one = tiny.random_sae(layer + 7)
        identity = Identity("SAE-Res-Other-W96-L0_6", layer, f"{layer + 7:064x}")
        save_sae(replace(one, hook_point=f"layers.{layer}.resid_post", identity=identity), out / "other-sae")  # type: ignore[type-var]
    save_sae(tiny.random_sae(0, d_model=16), out / "narrow")
    made = [("store", "c", tiny.folder() / "sae"), ("other", "c", out / "other-sae"), ("elsewhere", "d", SAE[1])]
    for name, documents, sae in made:
        argv = ["extract", str(out / f"{documents}.jsonl"), "-o", str(out / name), "--sae", str(sae), *WHERE]
        assert main([*argv, "--layers", "0"]) == 0
    for name in ("prompts", "positive", "negative", "unrelated"):
        words = ("Morgen", "Bahnhof") if name == "positive" else ("The weather", "today")
        (out / f"{name}.txt").write_text("".join(f"{word} {i}\n" for i in range(10) for word in words))
    return out


def validating(place: Path, *more: str) -> list[str]:
    texts = [f"--{name}={place / name}.txt" for name in ("positive", "negative", "unrelated")]
    aim = ["--amount", "0.5", "--regex", "[aeiou]", "--max-new-tokens", "2"]
    return ["validate", str(place / "prompts.txt"), *SAE, *WHERE, *texts, *aim, *more]


def test_a_verdict_that_validate_records_is_on_the_card(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["card", str(place / "store"), "0/3", "--no-model", "--json"]
    capsys.readouterr()
    assert main(asked) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["causal"] is None
    assert any("validate --record" in one for one in before["not_measured"])

    assert main(validating(place, "--feature", "0/3", "--record", str(place / "store"), "--json")) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert main(asked) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["causal"] == verdict | {key: after["causal"][key] for key in after["causal"].keys() - verdict.keys()}
    shares = {one["name"]: one["effect"]["estimate"] for one in verdict["conditions"]}
    assert after["faithfulness"] == pytest.approx(faithfulness([shares["this feature"]], shares["unsteered"]))
    assert (f"validate: {verdict['outcome']}" in after["failures"]) is (verdict["outcome"] != "causal")
    assert not any("validate --record" in one for one in after["not_measured"])
    assert main(["card", str(place / "store"), "0/4", "--no-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["causal"] is None


REFUSED = {
    "a store without the layer": ("card {store} 2/1", "has no layer 2; it has layers 0"),
    "a feature that the store lacks": ("card {store} 0/96", "layer 0 has features 0 to 95, not 96"),
    "no store": ("card {nowhere} 0/1", "nowhere"),
    "a dictionary of other residuals beside a card": (
        "card {store} 0/1 {sae} {where} --other {narrow}", "reads residuals of 32 dimensions and",
    ),
    "a card beside a store of other documents": (
        "card {store} 0/1 {sae} {where} --other {elsewhere}", "documents",
    ),
    "SAEs of residuals of two widths": ("match {tiny} {narrow} --layer 0", "can't be compared"),
    "match without the layer": ("match {tiny} {store} --layer 2", "has no layer 2; it has layers 0"),
    "stores of other documents": ("match {store} {elsewhere} --layer 0", "documents"),
    "an SAE of other residuals than the model's": (
        "score {narrow} {c} {where} -o {out} --layers 0 --tokens 64 --train-tokens 64 --batch 64 --context-length 16",
        "reads residuals of 16 dimensions, the model's have 32",
    ),
    "score without the layer": ("score {tiny} {c} {where} -o {out} --layers 1", "has no layer 1; it has layers 0, 2"),
    "an unknown dataset": (
        "score {tiny} {c} {where} -o {out} --layers 0 --columns n --datasets n=2", "has no dataset 'n=2'",
    ),
    "an unknown suite": ("score {tiny} {c} {where} -o {out} --suites probing", "there is no suite 'probing'"),
    "a wheel of something else": ("score {tiny} {c} {where} -o {out} --probes {c}", "neither a folder nor a wheel"),
    "labels of another SAE": ("label {store} --merge {notes}", "is about another SAE"),
    "a verdict into a store of another SAE": ("{validate} --feature 0/3 --record {other}", "was made with"),
    "a verdict on a layer that the store lacks": ("{validate} --feature 2/3 --record {store}", "has no layer 2"),
    "a verdict on a recipe": ("{validate} --recipe x.json --record {store}", "name it with --feature"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = REFUSED[name]
    with FeatureStore(place / "other") as other:
        Notes(other).write(0, 3, "a note")
        Notes(other).export(tmp_path / "notes.jsonl")
    known = {one: str(place / one) for one in ("store", "other", "elsewhere", "narrow", "nowhere")}
    known |= {"tiny": SAE[1], "c": str(place / "c.jsonl"), "out": str(tmp_path / "out")}
    lists = {"{where}": WHERE, "{sae}": SAE, "{validate}": validating(place)}
    argv = [one for word in words.split() for one in lists.get(word, [word])]
    argv = [word.format(notes=tmp_path / "notes.jsonl", **known) for word in argv]
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert not said.out
    (sentence,) = said.err.strip().splitlines()
    assert says in sentence
    assert not (tmp_path / "out" / "score.json").exists()
