"""The lab's makers on small jobs, and the bundled lab against the promises of its card."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.foundry import SMALL, PretrainConfig, build, card, make_model, make_tokenizer, pack, pretrain
from qwen_scope.foundry.detect import best_feature
from qwen_scope.lab import LANGUAGES, documents
from qwen_scope.sae import catalog


def test_the_tokenizer_is_lossless_and_invents_no_bos() -> None:
    texts = [d.text for d in documents(n=300)]
    tokenizer = make_tokenizer(texts, 1024, 512)
    for text in [*texts[:50], "🙂 неизвестное ‮слово\x00"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.bos_token is None
    assert max(tokenizer.get_vocab().values()) < 1024
    chat = tokenizer("<|im_start|>user\n<think>\n\n</think><|im_end|>")["input_ids"]
    for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert chat.count(tokenizer.get_vocab()[token]) == 1


def test_packing_loses_nothing_but_the_last_row() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder() / "model")
    rows = pack(tokenizer, tiny.TEXTS, row=16)
    separator = tokenizer.get_vocab()["<|endoftext|>"]
    stream = [i for text in tiny.TEXTS for i in [*tokenizer(text)["input_ids"], separator]]
    assert rows.flatten().tolist() == stream[: len(stream) // 16 * 16]
    with pytest.raises(InputError, match="do not fill one row of 4096"):
        pack(tokenizer, tiny.TEXTS, row=4096)


def test_pretraining_learns_and_repeats_itself() -> None:
    rows = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0))
    config = PretrainConfig(tokens=16 * 4 * 30, row=16, batch=4, warmup=5)
    curves = []
    for _ in range(2):
        model = make_model("dense", 64, 32, 2, 16, eos_token_id=1, pad_token_id=0)
        curves.append(pretrain(model, rows, config))
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[0][0] == pytest.approx(math.log(64), abs=0.3), "an untrained model knows nothing"


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(NotFoundError, match="did you mean 'moe'"):
        make_model("moo", 64, 32, 2, 16, eos_token_id=1, pad_token_id=0)


def test_the_best_single_feature_is_found_by_trying_every_threshold() -> None:
    rng = np.random.default_rng(0)
    values = np.maximum(rng.normal(size=(60, 7)).astype(np.float32), 0).round(1)
    y = rng.random(60) < 0.4

    def f1(called: np.ndarray) -> float:
        return 2 * (called & y).sum() / max(1, called.sum() + y.sum())

    tried = max(f1(values[:, j] > t) for j in range(7) for t in [0.0, *np.unique(values[:, j][values[:, j] > 0])[:-1]])
    score, _, feature, threshold = best_feature(values, y)
    assert score == pytest.approx(tried, abs=0.005), "the best to two digits"
    assert f1(values[:, feature] > threshold) == pytest.approx(score)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "moe", "hybrid"])
def test_every_family_can_be_built(family: str, tmp_path: Path) -> None:
    """A build far shorter than `--small`: every stage runs and the result opens as a scope."""
    from qwen_scope import load_scope

    config = replace(
        SMALL,
        family=family,
        n_documents=600,
        n_tokenizer=800,
        d_model=64,
        pretrain=PretrainConfig(tokens=16_000, batch=8, warmup=5),
        d_sae=1024,
        sae_tokens=20_000,
        per_factor=6,
    )
    stages = []
    metrics = build(tmp_path / "lab", config, lambda stage, share, text: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["corpus", "language model", "SAEs", "measuring"]
    assert json.loads((tmp_path / "lab" / "metrics.json").read_text())["group"] == config.group
    assert config.group in card(metrics)
    scope = load_scope(tmp_path / "lab" / "model", tmp_path / "lab" / "sae", device="cpu")
    seen = scope.features(["Wo ist der Bahnhof?"])
    assert seen.layers == list(range(config.n_layers))
    assert all(seen.of(0, layer).active().float().mean() > config.k / 2 for layer in seen.layers)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        build(tmp_path / "other", config)


def bundled() -> dict:
    return json.loads((Path(catalog.find("lab").model).parent / "metrics.json").read_text())


def test_the_bundled_lab_keeps_its_promises() -> None:
    metrics = bundled()
    assert 4 <= metrics["config"]["n_layers"] <= 8
    for layer, found in metrics["reconstruction"].items():
        assert found["explained_variance"] > 0.9, layer
    scores = {d["factor"]: d["f1"] for d in metrics["detectors"]}
    for language in LANGUAGES:
        assert scores[language] >= 0.95
        assert scores[f"{language}/rude"] >= 0.95
    folder = Path(catalog.find("lab").model).parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 16e6


def test_the_card_is_the_one_of_the_bundled_lab() -> None:
    page = Path(__file__).parents[2] / "docs" / "lab.md"
    assert page.read_text() == card(bundled()), "write it again: qwen-scope lab card > docs/lab.md"
