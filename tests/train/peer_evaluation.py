"""Runs where sae_lens is installed: its own evaluation of an exported SAE. Usage: MODEL SAE MODULE TOKENS OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

model_folder, sae_folder, module, tokens, out = sys.argv[1:]
ids = load_file(tokens)["ids"]
model = load_model("AutoModelForCausalLM", model_folder, device="cpu", hook_names=[module])
sae = SAE.load_from_disk(sae_folder)
sae.cfg.metadata.hook_name = module


class Store:
    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        return ids


common = {"n_batches": 1, "eval_batch_size_prompts": len(ids), "model_kwargs": {}}
with torch.no_grad():
    loss = get_downstream_reconstruction_metrics(
        sae, model, Store(), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **common
    )
    variance, _ = get_sparsity_and_variance_metrics(
        sae, model, Store(), ActivationScaler(), compute_l2_norms=False, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=False, **common,
    )  # fmt: skip
Path(out).write_text(json.dumps({**loss, **variance}))
