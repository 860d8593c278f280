"""SAEs whose files name another model than the one at hand: said once, and not where the names mean the same."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from families import FAMILIES

from qwen_scope.cli import main
from qwen_scope.errors import MismatchError, QwenScopeWarning
from qwen_scope.model import HookPoint
from qwen_scope.sae import catalog, save_sae
from qwen_scope.scope import load_scope
from qwen_scope.scope.joined import check_stream, difference, names_of_model

SAME = [
    ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
    ("Qwen/Qwen3-8B-Base", "unsloth/Qwen3-8B-Base"),
    ("qwen3-8b-base", "Qwen/Qwen3-8B-Base"),
    ("Qwen3_8B_Base", "Qwen/Qwen3-8B-Base"),
    ("gpt2-small", "openai-community/gpt2"),
    ("gpt2", "gpt2-small"),
    ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
    ("google/gemma-2-2b", "gemma-2-2b"),
    ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-FP8"),
    ("Qwen/Qwen3-8B", "mlx-community/Qwen3-8B-4bit"),
    ("Qwen/Qwen3-8B", "bartowski/Qwen3-8B-GGUF"),
    ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B-hf"),
    ("Qwen/Qwen3-8B-Base", "/models/qwen3-8b-base/"),
]
VARIANTS = [
    ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
    ("Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-27B-Base"),
    ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507"),
]
OTHERS = [
    ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-4B-Base"),
    ("Qwen/Qwen3-8B", "Qwen/Qwen3.5-8B"),
    ("gpt2-small", "gpt2-medium"),
    ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m-deduped"),
    ("google/gemma-2-2b", "google/gemma-3-2b"),
    ("Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-30B-Base"),
    ("Qwen/Qwen3-8B-Base", "deepseek-ai/DeepSeek-R1-Distill-Qwen-8B"),
]


@pytest.mark.parametrize(("trained_on", "model"), SAME)
def test_spellings_of_one_model_are_no_alarm(trained_on: str, model: str) -> None:
    assert difference(trained_on, model) is None


@pytest.mark.parametrize(("trained_on", "model"), VARIANTS)
def test_base_and_post_trained_have_a_phrase_of_their_own(trained_on: str, model: str) -> None:
    said = difference(trained_on, model)
    assert said is not None
    assert "another variant of that model (base or post-trained)" in said
    assert trained_on in said
    assert model in said


@pytest.mark.parametrize(("trained_on", "model"), OTHERS)
def test_another_model_is_named(trained_on: str, model: str) -> None:
    said = difference(trained_on, model)
    assert said is not None
    assert f"another model: their files name {trained_on}, and the model is {model}" in said


def test_no_group_of_the_catalog_is_an_alarm_on_its_own_model() -> None:
    for group in catalog.groups():
        assert difference(group.model, group.model) is None
        assert group.folder is not None or difference(group.model, group.model.lower()) is None


def test_folders_are_known_by_what_they_hold(tmp_path: Path) -> None:
    plain = tmp_path / "Qwen3-8B-Base"
    plain.mkdir()
    assert difference("Qwen/Qwen3-8B-Base", str(plain)) is None
    named = tmp_path / "mine"
    named.mkdir()
    (named / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-8B-Base"}))
    assert difference("Qwen/Qwen3-8B-Base", str(named)) is None
    assert "the model is Qwen/Qwen3-8B-Base" in (difference("gpt2", str(named)) or "")
    cached = tmp_path / "models--Qwen--Qwen3-8B-Base" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    assert names_of_model(str(cached))[0] == "Qwen/Qwen3-8B-Base"
    assert difference("Qwen/Qwen3-8B-Base", str(cached)) is None
    assert difference(str(named), f"{named}/") is None
    (named / "config.json").write_text("[" * 100_000)
    assert "another model" in (difference("gpt2", str(named)) or "")


@pytest.mark.parametrize("layout", ["sae_lens", "dictionary_learning", "official", "safetensors"])
def test_it_is_said_once_where_they_meet(layout: str, tmp_path: Path) -> None:
    saes = [replace(tiny.random_sae(n), meta={"model": "google/gemma-2-2b"}) for n in (0, 2)]
    save_sae(saes, tmp_path / "sae", layout)
    scope = load_scope(tiny.folder() / "model", tmp_path / "sae", device="cpu")
    with pytest.warns(QwenScopeWarning, match="their files name google/gemma-2-2b") as caught:
        scope.features(["one text"])
    assert len(caught) == 1
    assert len(scope.notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scope.features(["another text"])


@pytest.mark.slow
def test_the_lab_and_saes_that_say_nothing_are_no_alarm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab = load_scope()
        lab.features(["hello"], [lab.layers[0]])
        plain = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")
        plain.features(["hello"])
    assert lab.notes == plain.notes == ()


@pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")
def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sae(replace(tiny.random_sae(0), meta={"model": "gpt2-small"}), tmp_path / "sae", "sae_lens")
    argv = ["features", "hello", "--model", str(tiny.folder() / "model"), "--sae", str(tmp_path / "sae")]
    assert main([*argv, "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err.count("their files name gpt2-small") == 1


def test_a_part_that_tools_read_on_two_sides_of_a_norm_is_refused() -> None:
    said = {"sae_lens": {"hook_name": "blocks.1.hook_mlp_out"}}
    sae = replace(tiny.random_sae(1), hook_point="layers.1.mlp_out", meta=said)
    point = HookPoint(1, "mlp_out")
    with pytest.raises(MismatchError, match=r"blocks\.1\.hook_mlp_out, which is behind a norm"):
        check_stream(sae, FAMILIES["gemma2"](), point)
    check_stream(sae, FAMILIES["llama"](), point)
    check_stream(replace(sae, meta={}), FAMILIES["gemma2"](), point)
