"""Our side of the checks against a peer: `write` SAEs in its layout, then `check` what it made of them and of its own.

The peer's script finds `ours/<case>/` and `residuals.safetensors`; it leaves `features/<case>.safetensors` with
`acts (n, d_sae)` and `recon (n, d_model)` for each of ours, and `theirs/<case>/` with `features/` for its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen_scope.sae import SAE, Identity, JumpReLU, TopK, fingerprint, load_sae, save_sae

D_MODEL, D_SAE, K, ROWS, LAYER = 64, 1024, 16, 512, 5
CASES = {
    "sae_lens": {"topk": None, "jumprelu": None, "topk_bf16": torch.bfloat16},
    "sparsify": {"topk": None},  # it takes a bf16 file's biases to bf16 too, and computes in that
    "dictionary_learning": {"topk": None, "jumprelu": None, "topk_bf16": torch.bfloat16},
}


def make(kind: str) -> SAE:
    """A random SAE with biases large enough that a wrong fold shows."""
    g = torch.Generator().manual_seed(len(kind))
    W_enc, W_dec = torch.randn(D_SAE, D_MODEL, generator=g), torch.randn(D_MODEL, D_SAE, generator=g)
    weights = (W_enc, W_dec, torch.randn(D_SAE, generator=g) * 4, torch.randn(D_MODEL, generator=g) * 4)
    said = {"hook_point": f"layers.{LAYER}.resid_post", "identity": Identity("toy", LAYER, fingerprint(*weights))}
    if kind == "jumprelu":
        return JumpReLU(*weights, threshold=10 + 10 * torch.rand(D_SAE, generator=g), **said)
    return TopK(*weights, k=K, **said)


def write(peer: str, work: Path) -> None:
    """Leave our SAEs and the residuals for the peer."""
    x = torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)) + 1
    save_file({"x": x}, work / "residuals.safetensors")
    for case, dtype in CASES[peer].items():
        save_sae(make(case.split("_")[0]), work / "ours" / case, layout=peer, dtype=dtype)


def agree(sae: SAE, x: torch.Tensor, theirs: dict[str, torch.Tensor]) -> str:
    """`""` if the peer's features and reconstructions are ours up to fp32 rounding, else what differs."""
    acts = sae.encode(x)
    mine, other = acts.to_dense(), theirs["acts"].float()
    scale = float(mine.abs().max())
    # A feature in one set only must stand within rounding of the line both sets were cut at.
    line = torch.where(acts.values > 0, acts.values, torch.inf).amin(-1, keepdim=True)
    apart = (mine > 0) != (other > 0)
    wrong = apart & ((torch.maximum(mine, other) - line).abs() > 1e-5 * scale)
    if wrong.any():
        return f"{int(wrong.any(-1).sum())} of {len(x)} rows have other active features"
    error = float((mine - other)[~apart].abs().max()) / scale
    recon = float((sae.decode(acts) - theirs["recon"].float()).norm() / theirs["recon"].float().norm())
    bad = error > 1e-5 or (recon > 1e-5 and not apart.any())
    return f"values differ by {error:.1e}, reconstructions by {recon:.1e}" if bad else ""


def check(peer: str, work: Path) -> int:
    """Compare everything; returns the exit code."""
    x = load_file(work / "residuals.safetensors")["x"]
    saes = {}
    for case, dtype in CASES[peer].items():
        saes[f"ours in {peer}", case] = make(case.split("_")[0]).to(dtype=dtype)
    for folder in sorted((work / "theirs").iterdir()):
        saes[f"{peer}'s in ours", folder.name] = load_sae(folder)
    failed = 0
    for (direction, case), sae in saes.items():
        where = "ours" if direction.startswith("ours") else "theirs"
        said = agree(sae, x, load_file(work / "features" / f"{where}_{case}.safetensors"))
        l0 = float(sae.encode(x).active().float().mean())
        print(f"{'FAIL' if said else 'ok  '} {direction}: {case} (L0 {l0:.1f}) {said}".rstrip())
        failed += bool(said)
    return int(failed > 0)


if __name__ == "__main__":
    verb, peer, work = sys.argv[1:]
    if verb == "write":
        write(peer, Path(work))
    else:
        sys.exit(check(peer, Path(work)))
