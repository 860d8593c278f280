"""Verdicts on pairs are kept under both fingerprints, shown by whatever opens the pair, and never believed blindly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from qwen_scope import load_scope
from qwen_scope.errors import QwenScopeWarning
from qwen_scope.model import load_model, weights_fingerprint
from qwen_scope.sae import load_sae, save_sae
from qwen_scope.scope import DO_NOT_USE, FITS, LOSSES, Verdict, recall, remember, tell_of
from qwen_scope.scope.verdicts import place_of, state_folder

MODEL, SAES = str(tiny.folder() / "model"), str(tiny.folder() / "sae")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="module")
def weights() -> str:
    found = weights_fingerprint(load_model(MODEL, device="cpu").model)
    assert found is not None
    return found


def verdict(word: str = FITS, model: str = "m" * 64, layer: int = 0, **changes) -> Verdict:
    one = Verdict(
        word, load_sae(SAES, layer).identity.fingerprint, model, {0: word, 2: LOSSES}, "some/base", 12345, 67,
        "corpus.jsonl", "2026-11-28", {"ev_post": (0.8, 0.7, 0.9)}, {"answer": FITS},
    )  # fmt: skip
    return replace(one, **changes)


def test_what_is_remembered_is_recalled_for_this_pair_alone(state: Path) -> None:
    kept = verdict()
    path = remember(kept)
    assert path is not None
    assert path.parent == state / "verdicts"
    assert recall(kept.sae, lambda: kept.model) == kept
    assert recall(kept.sae, lambda: "n" * 64) is None
    assert recall("another", lambda: kept.model) is None
    assert recall(kept.sae, lambda: None) is None
    again = replace(kept, verdict=LOSSES)
    remember(again)
    assert recall(kept.sae, lambda: kept.model) == again


def test_the_model_is_not_read_where_nothing_is_known_of_the_sae(state: Path) -> None:
    remember(verdict())
    assert recall("another", lambda: pytest.fail("the model was read")) is None


def test_the_sentence_names_every_layer_of_the_run() -> None:
    assert verdict().sentence == (
        "these SAEs on this model: fits with losses at layer 2; fits at layer 0 (compared with some/base on 12,345"
        " tokens of corpus.jsonl, 2026-11-28)"
    )
    assert "measured without its base" in verdict(base=None).sentence


BAD = {
    "no JSON": b"{", "empty": b"", "not UTF-8": b"\xff\xfe", "a list": b"[1]", "deep": b"[" * 100_000,
    "another format": json.dumps({"format": "x", "version": 1}).encode(),
}  # fmt: skip
CHANGED = {
    "another pair": {"model": "x"}, "no word": {"verdict": "splendid"}, "a number for a text": {"corpus": 3},
    "tokens as text": {"tokens": "many"}, "true for a count": {"documents": True}, "an unknown key": {"more": 1},
    "a layer that is none": {"layers": {"-1": "fits"}}, "a huge layer": {"layers": {"9" * 5000: "fits"}},
    "two numbers": {"figures": {"a": [1, 2]}}, "NaN": {"figures": {"a": [float("nan")] * 3}},
    "figures as a list": {"figures": []}, "version as true": {"version": True}, "no version": {"version": None},
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, *CHANGED])
def test_a_file_that_is_none_is_passed_over_with_a_sentence(name: str, state: Path) -> None:
    kept = verdict()
    path = remember(kept)
    assert path is not None
    data = BAD[name] if name in BAD else json.dumps({**kept.to_json(), **CHANGED[name]}).encode()
    path.write_bytes(data)
    with pytest.warns(QwenScopeWarning, match="a remembered verdict is passed over: .*; delete the file") as told:
        assert recall(kept.sae, lambda: kept.model) is None
    assert len(str(told[0].message)) < 600
    assert "\n" not in str(told[0].message)
    assert remember(kept) == path
    assert recall(kept.sae, lambda: kept.model) == kept


def test_a_pipe_or_a_folder_in_its_place_is_not_read(state: Path) -> None:
    kept = verdict()
    path = remember(kept)
    assert path is not None
    for make in (os.mkfifo, os.mkdir):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.warns(QwenScopeWarning, match="is no file"):
            assert recall(kept.sae, lambda: kept.model) is None


@pytest.mark.parametrize("version", [0, 2])
def test_a_verdict_by_another_rule_is_none(version: int, state: Path) -> None:
    kept = verdict()
    path = remember(kept)
    assert path is not None
    path.write_text(json.dumps({**kept.to_json(), "version": version, "rule": "another"}))
    assert recall(kept.sae, lambda: kept.model) is None


def test_a_fingerprint_from_a_file_is_no_path(state: Path) -> None:
    evil = verdict(sae="../../../../etc/x\0\n", model="../y")
    path = remember(evil)
    assert path is not None
    assert path.parent == state / "verdicts"
    assert path.name == place_of(evil.sae, evil.model)
    assert recall(evil.sae, lambda: evil.model) == evil


def test_a_folder_that_cannot_be_written_costs_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "file"))
    with pytest.warns(QwenScopeWarning, match="the verdict is not remembered: .*; name a folder with QWEN_SCOPE_STATE"):
        assert remember(verdict()) is None
    assert recall(verdict().sae, lambda: "m" * 64) is None


def test_where_the_state_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "named"
    monkeypatch.setenv("QWEN_SCOPE_STATE", "")
    assert state_folder() == tmp_path / "xdg" / "qwen-scope"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder() == tmp_path / "home" / ".local" / "state" / "qwen-scope"
    monkeypatch.setenv("HOME", "")
    found = state_folder()
    assert found is None or found.is_absolute()


def test_two_processes_at_once_leave_a_whole_file(state: Path) -> None:
    code = (
        "import json, sys\nfrom dataclasses import replace\nfrom qwen_scope.scope.verdicts import Verdict, remember\n"
        "one = Verdict.from_json(json.loads(sys.argv[1]), 'x')\n"
        "for i in range(40): assert remember(replace(one, tokens=int(sys.argv[2]) * 1000 + i))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    run = [sys.executable, "-c", code, json.dumps(verdict().to_json())]
    jobs = [subprocess.Popen([*run, str(n)], env=env, stderr=subprocess.PIPE) for n in (1, 2)]
    for job in jobs:
        _, err = job.communicate(timeout=120)
        assert job.returncode == 0, err.decode()
    found = recall(verdict().sae, lambda: "m" * 64)
    assert found is not None
    assert found.tokens in (1039, 2039)
    assert len(list((state / "verdicts").iterdir())) == 1


def test_a_scope_knows_the_verdict(state: Path, weights: str, caplog: pytest.LogCaptureFixture) -> None:
    for layer in (0, 2):
        remember(verdict(model=weights, layer=layer, verdict=FITS if layer == 0 else LOSSES))
    with caplog.at_level(logging.INFO, "qwen_scope"):
        scope = load_scope(MODEL, SAES, device="cpu")
        assert [one.verdict for one in (scope.verdicts[0], scope.verdicts[2]) if one] == [FITS, LOSSES]
    assert [record.getMessage() for record in caplog.records] == [verdict().sentence]
    assert scope.notes == ()
    with pytest.raises(Exception, match="no SAE for layer 1"):
        scope.verdicts[1]


def test_do_not_use_is_a_warning(state: Path, weights: str) -> None:
    remember(verdict(DO_NOT_USE, model=weights))
    scope = load_scope(MODEL, SAES, device="cpu")
    with pytest.warns(QwenScopeWarning, match="these SAEs on this model: do not use at layer 0"):
        found = scope.verdicts[0]
    assert found is not None
    assert found.verdict == DO_NOT_USE
    assert scope.verdicts[2] is None
    assert len(scope.notes) == 1


def test_a_measured_pair_is_not_doubted_by_its_names(state: Path, weights: str, tmp_path: Path) -> None:
    named = [replace(tiny.random_sae(n), meta={"model": "google/gemma-2-2b"}) for n in (0, 2)]
    save_sae(named, tmp_path / "sae")
    settle = f"qwen-scope eval CORPUS --model google/gemma-2-2b --sae {tmp_path / 'sae'} --post {MODEL}"
    with pytest.warns(QwenScopeWarning, match="another model: .*; to measure whether they fit: ") as told:
        assert load_scope(MODEL, tmp_path / "sae", device="cpu").verdicts[0] is None
    assert str(told[0].message).endswith(settle)
    remember(verdict(model=weights))
    scope = load_scope(MODEL, tmp_path / "sae", device="cpu")
    assert scope.verdicts[0] is not None
    assert scope.notes == ()


def test_what_is_said_of_a_model_that_another_process_runs(
    state: Path, weights: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {layer: load_sae(SAES, layer) for layer in (0, 2)}
    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.scope.joined.load_model", lambda *a, **k: pytest.fail("the model was opened"))
        tell_of(MODEL, SAES, saes)
        named = {0: replace(saes[0], meta={"model": "google/gemma-2-2b"})}
        with pytest.warns(QwenScopeWarning, match="another model: their files name google/gemma-2-2b"):
            tell_of(MODEL, SAES, named)
    remember(verdict(model=weights))
    with caplog.at_level(logging.INFO, "qwen_scope"):
        tell_of(MODEL, SAES, named)
    assert [record.getMessage() for record in caplog.records] == [verdict().sentence]
    remember(verdict(DO_NOT_USE, model=weights))
    with pytest.warns(QwenScopeWarning, match="do not use at layer 0"):
        tell_of(MODEL, SAES, saes)


def test_recorded_weights_tell_what_names_do_not(state: Path, weights: str, tmp_path: Path) -> None:
    def saes(name: str, model: str, fingerprint: str | None = None) -> Path:
        meta = {"history": {"layers.0.resid_post": {"model": model, "tokens": 1, "began_as": []}}}
        base = {} if fingerprint is None else {"base": {"weights": fingerprint}}
        save_sae([replace(tiny.random_sae(0), meta={**meta, **base})], tmp_path / name)
        return tmp_path / name

    for name, record in {"a": ("elsewhere/moved", weights), "b": (MODEL,)}.items():
        scope = load_scope(MODEL, saes(name, *record), device="cpu")
        assert scope.verdicts[0] is None
        assert scope.notes == ()
    for name, model, said in (
        ("c", MODEL, "other weights than those of .*, though the names agree"),
        ("d", "x/y", "x/y"),
    ):
        scope = load_scope(MODEL, saes(name, model, "0" * 64), device="cpu")
        with pytest.warns(QwenScopeWarning, match=f"trained on .*{said}"):
            assert scope.verdicts[0] is None
