"""Runs where sparsify is installed: it loads our folders, and makes folders of its own for us to load."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

D_IN, D_SAE, K, LAYER = 64, 1024, 16, 5


def features(sae: SparseCoder, x: torch.Tensor, path: Path) -> None:
    with torch.no_grad():
        found = sae.encode(x)
        acts = torch.zeros(len(x), D_SAE).scatter(-1, found.top_indices, found.top_acts.float())
        recon = sae.decode(found.top_acts, found.top_indices)
        save_file({"acts": acts, "recon": recon.float().contiguous()}, path)


def main(work: Path) -> None:
    x = load_file(work / "residuals.safetensors")["x"]
    (work / "features").mkdir()
    for folder in (work / "ours").iterdir():
        sae = SparseCoder.load_from_disk(folder).float()
        features(sae, x, work / "features" / f"ours_{folder.name}.safetensors")
    for case, normalize in {"unit_decoder": True, "free_decoder": False}.items():
        config = SparseCoderConfig(num_latents=D_SAE, k=K, normalize_decoder=normalize)
        sae = SparseCoder(D_IN, config)
        torch.manual_seed(2)
        with torch.no_grad():
            sae.encoder.weight.normal_()
            sae.encoder.bias.normal_(std=3)
            sae.b_dec.normal_(std=3)
            sae.W_dec.normal_()
            if normalize:
                sae.set_decoder_norm_to_unit_norm()
        folder = work / "theirs" / case
        sae.save_to_disk(folder)
        features(SparseCoder.load_from_disk(folder), x, work / "features" / f"theirs_{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
