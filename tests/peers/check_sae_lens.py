"""Runs where sae_lens is installed: it loads our folders, and makes folders of its own for us to load."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K, LAYER = 64, 1024, 16, 5
META = {"model_name": "toy", "hook_name": f"blocks.{LAYER}.hook_resid_post"}


def features(sae: SAE, x: torch.Tensor, path: Path) -> None:
    with torch.no_grad():
        acts = sae.encode(x)
        save_file({"acts": acts.contiguous(), "recon": sae.decode(acts).contiguous()}, path)


def randomize(sae: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * (3 if name.startswith("b_") else 1))
            if name == "threshold":
                parameter.copy_(10 + 5 * torch.rand(parameter.shape, generator=g))


def own(work: Path, x: torch.Tensor) -> None:
    """SAEs as sae_lens itself configures, saves and encodes them."""
    for case, options in {
        "topk_defaults": {},
        "topk_rescaled": {"rescale_acts_by_decoder_norm": True},
        "topk_raw_input": {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
    }.items():
        sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **options))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = META["model_name"], META["hook_name"]
        randomize(sae)
        sae.save_model(work / "theirs" / case)
    jump = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    jump.cfg.metadata.hook_name = META["hook_name"]
    randomize(jump)
    jump.save_model(work / "theirs" / "jumprelu")
    batch = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    batch.cfg.metadata.hook_name = META["hook_name"]
    randomize(batch)
    batch.topk_threshold.fill_(60.0)  # in units of a rescaled pre-activation
    batch.save_inference_model(work / "theirs" / "batchtopk")


def old_style(work: Path) -> None:
    """The same weights under a config from before version 6, which says nothing of `apply_b_dec_to_input`."""
    source, target = work / "theirs" / "topk_defaults", work / "theirs" / "pre_6"
    shutil.copytree(source, target)
    config = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_name": META["hook_name"],
        "hook_layer": LAYER,
        "model_name": "toy",
        "normalize_activations": "none",
    }
    (target / "cfg.json").write_text(json.dumps(config))


def main(work: Path) -> None:
    x = load_file(work / "residuals.safetensors")["x"]
    (work / "features").mkdir()
    for folder in (work / "ours").iterdir():
        sae = SAE.load_from_disk(folder, dtype="float32")
        assert sae.cfg.metadata.hook_name == META["hook_name"], sae.cfg.metadata.hook_name
        assert not sae.cfg.apply_b_dec_to_input
        features(sae, x, work / "features" / f"ours_{folder.name}.safetensors")
    own(work, x)
    old_style(work)
    for folder in (work / "theirs").iterdir():
        features(SAE.load_from_disk(folder), x, work / "features" / f"theirs_{folder.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
