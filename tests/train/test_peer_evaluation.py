"""Explained variance and CE recovered agree with sae_lens' own evaluation of the same exported SAE, same tokens."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_scope.model import HookPoint
from qwen_scope.sae import save_sae
from qwen_scope.text import Corpus, Counted, TokenRows
from qwen_scope.train import ResidualBuffer, TrainConfig, evaluate_saes, train

from .conftest import sentences

PYTHON = Path(__file__).parents[2] / ".venv-sae_lens" / "bin" / "python"
POINT = HookPoint(1)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="tests/peers/run.sh sae_lens makes its environment")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_our_figures_are_those_of_sae_lens(loaded, model_folder: Path, tmp_path: Path, architecture: str) -> None:
    source = ResidualBuffer(
        loaded.model,
        TokenRows(Corpus(sentences(500), repeat=True), loaded.tokenizer, context_length=16, batch_size=8),
        [POINT],
        batch=128,
        most=128 * 50,
        counted=Counted.everything(),
    )
    config = TrainConfig(d_sae=64, k=4, tokens=128 * 50, batch=128, lr=3e-3, architecture=architecture)
    sae = train(config, source)[str(POINT)]
    ids = torch.cat(
        list(
            islice(
                TokenRows(
                    Corpus(sentences(300, seed=1), repeat=True), loaded.tokenizer, context_length=24, batch_size=8
                ),
                4,
            )
        )
    )
    save_sae(sae, tmp_path / "sae", layout="sae_lens")
    save_file({"ids": ids}, tmp_path / "tokens.safetensors")
    paths = [tmp_path / "sae", "model.layers.1", tmp_path / "tokens.safetensors", tmp_path / "out.json"]
    subprocess.run(
        [PYTHON, "-W", "ignore", Path(__file__).with_name("peer_evaluation.py"), model_folder, *paths],
        check=True, capture_output=True, env={**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    theirs = json.loads((tmp_path / "out.json").read_text())
    found = evaluate_saes(loaded.model, {POINT: sae}, [ids], counted=Counted.everything())[POINT]
    ours = found.plain()
    for our_name, their_name in {
        "explained_variance": "explained_variance",
        "explained_variance_per_token": "explained_variance_legacy",
        "cosine": "cossim",
        "l0": "l0",
        "ce_clean": "ce_loss_without_sae",
        "ce_spliced": "ce_loss_with_sae",
        "ce_zero": "ce_loss_with_ablation",
        "ce_recovered": "ce_loss_score",
        "kl": "kl_div_with_sae",
    }.items():
        assert ours[our_name] == pytest.approx(theirs[their_name], rel=1e-4, abs=1e-5), our_name
