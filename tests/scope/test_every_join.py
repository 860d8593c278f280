"""Wherever SAEs meet a model, or a store meets either, another model's name in the files is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import MismatchError, QwenScopeWarning
from qwen_scope.model import load_model
from qwen_scope.posttrain import RLRun, SFTRun
from qwen_scope.posttrain.rl import rollouts_of
from qwen_scope.posttrain.sft import monitor_of
from qwen_scope.sae import load_sae, save_sae
from qwen_scope.scope import Joined, store_of_another
from qwen_scope.steer import Intervention, Recipe

MODEL = str(tiny.folder() / "model")
SAID = "their files name google/gemma-2-2b"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SAEs that fit the tiny model and say that they were trained on another."""
    out = tmp_path_factory.mktemp("gemma") / "sae"
    save_sae([replace(tiny.random_sae(n), meta={"model": "google/gemma-2-2b"}) for n in (0, 2)], out)
    return str(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS * 20))
    return str(path)


EVAL = ["eval", "CORPUS", "--layers", "0", "--tokens", "256", "--context-length", "16", "--no-loss", "--sae", "GEMMA"]
COMMANDS = {
    "features": ["features", "hello", "--sae", "GEMMA"],
    "extract": ["extract", "CORPUS", "--layers", "0", "-o", "OUT", "--sae", "GEMMA"],
    "eval": EVAL,
    "eval post": [*EVAL, "--post", MODEL],
    "train from": [
        "train", "CORPUS", "-o", "OUT", "--group", "g", "--layers", "0", "--start-from", "GEMMA",
        "--tokens", "512", "--batch", "256", "--d-sae", "96", "--k", "6", "--context-length", "16",
        "--eval-tokens", "0",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_it(name: str, gemma: str, corpus: str, tmp_path: Path, capsys) -> None:
    put = {"GEMMA": gemma, "CORPUS": corpus, "OUT": str(tmp_path / "out")}
    argv = [put.get(word, word) for word in COMMANDS[name]]
    code = main([*argv, "--model", MODEL, "--device", "cpu"])
    err = capsys.readouterr().err
    assert code == 0, err
    assert SAID in " ".join(err.split())


def test_what_trains_on_features_says_it(gemma: str, tmp_path: Path) -> None:
    loaded = load_model(MODEL, device="cpu")
    with pytest.warns(QwenScopeWarning, match=SAID):
        monitor_of(SFTRun(MODEL, tmp_path, sae=gemma), loaded, None, ["hello", "there"], [])
    add = Intervention.add(layer=0, feature=3, amount=1.0, unit="raw")
    recipe = Recipe.of("r", loaded.model, [add], {0: load_sae(gemma, 0)})
    with pytest.warns(QwenScopeWarning, match=SAID):
        rollouts_of(RLRun(MODEL, tmp_path, sae=gemma, unchecked=True), loaded, recipe)


def test_two_variants_may_be_compared_and_two_models_not() -> None:
    loaded = replace(load_model(MODEL, device="cpu"), name="Qwen/Qwen3-8B")
    base = replace(tiny.random_sae(0), meta={"model": "Qwen/Qwen3-8B-Base"})
    with pytest.warns(QwenScopeWarning, match="another variant"):
        Joined(loaded, "x").meet(0, base)
    compared = Joined(loaded, "x", variants=False)
    assert compared.meet(0, base) is base
    assert compared.notes == ()
    with pytest.warns(QwenScopeWarning, match="another model"):
        compared.meet(0, replace(base, meta={"model": "gpt2"}))


@pytest.mark.parametrize(
    ("sae", "layer", "sentence"),
    [
        (tiny.random_sae(0, d_model=48), 0, "reads residuals of 48 dimensions, the model's have 32"),
        (tiny.random_sae(3), 3, "reads layers.3.resid_post, but .* has 3 layers, counted from 0"),
        (replace(tiny.random_sae(7), hook_point="layers.7.mlp_out"), 7, "reads layers.7.mlp_out, but"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(sae, layer: int, sentence: str) -> None:
    with pytest.raises(MismatchError, match=sentence):
        Joined(load_model(MODEL, device="cpu"), "x").meet(layer, sae)


@pytest.mark.slow
@pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")
def test_a_store_is_not_read_with_other_saes_or_another_model_unsaid(corpus: str, tmp_path: Path, capsys) -> None:
    mine, other = (
        [replace(tiny.random_sae(n), identity=tiny.random_sae(n).identity) for n in (0, 2)],
        tmp_path / "other",
    )
    save_sae(mine, tmp_path / "mine")
    save_sae([replace(one, identity=replace(one.identity, fingerprint="e" * 64)) for one in mine], other)
    store = str(tmp_path / "store")
    where = ["--model", MODEL, "--sae", str(tmp_path / "mine"), "--device", "cpu"]
    assert main(["extract", corpus, "--layers", "0,2", "-o", store, *where]) == 0
    asked = {
        "show": ["show", store, "--layer", "0", "-f", "3"],
        "near": ["find", store, "--near", "0/3"],
        "label": ["find", store, "--label", "x"],
        "repetition": ["find", store, "--repetition", "all"],
    }
    for argv in asked.values():
        capsys.readouterr()
        assert main([*argv, "--sae", str(other)]) == 2, argv
        assert "was made with the SAE" in " ".join(capsys.readouterr().err.split())
    another = tmp_path / "Llama-9"
    another.symlink_to(MODEL)
    named = tmp_path / "named"
    named.mkdir()
    for path in Path(MODEL).iterdir():
        (named / path.name).symlink_to(path)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").unlink()
    (named / "config.json").write_text(json.dumps({**config, "_name_or_path": "google/gemma-2-2b"}))
    for model, said in ((another, False), (named, True)):
        assert main([*asked["show"], "--model", str(model), "--sae", str(tmp_path / "mine")]) == 0
        assert ("the model is google/gemma-2-2b" in " ".join(capsys.readouterr().err.split())) is said


def test_the_sentence_about_a_store() -> None:
    assert store_of_another("Qwen/Qwen3-8B", "unsloth/Qwen3-8B") is None
    assert store_of_another("lab", "lab") is None
    said = store_of_another("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B")
    assert said is not None
    assert said.startswith("the store was made with Qwen/Qwen3-8B-Base, and the model is Qwen/Qwen3-8B;")
