"""Opening one layer's file and encoding the first token, beside reading the file's bytes; the page cache is warm.

    python bench/open.py [--rounds 7]

A layer of the shape of the 1.7B model in fp32, in the official layout and in sae_lens' own.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

from side_by_side import PAGE, Way, add_peers, alternate, at_most, ratio, table, tensors, write

import torch  # isort: skip

from qwen_scope.sae import Identity, TopK, fingerprint, load_sae, save_sae  # isort: skip

D_MODEL, D_SAE, K = 2048, 32768, 50
GOAL = 1.2


def files(root: Path) -> Path:
    """One layer, as released and as sae_lens keeps it."""
    _, W, b = tensors(D_MODEL, D_SAE, 1)
    weights = W, W.T.contiguous(), b, torch.zeros(D_MODEL)
    named = {
        "hook_point": "layers.3.resid_post",
        "identity": Identity("SAE-Res-Toy-W32K-L0_50", 3, fingerprint(*weights)),
    }
    sae = TopK(*weights, k=K, **named)
    save_sae(sae, root / "official")
    save_sae(sae, root / "sae_lens", "sae_lens")
    return next((root / "official").glob("*.pt"))


def reading(file: Path) -> Way:
    """Every byte into memory that is there already."""
    room = memoryview(bytearray(file.stat().st_size))

    def way() -> None:
        with file.open("rb", buffering=0) as stream:
            done = 0
            while done < len(room):
                done += stream.readinto(room[done:]) or 0

    return way


def ours(folder: Path, x: torch.Tensor) -> Way:
    def way() -> list[int]:
        return sorted(load_sae(folder).encode(x).indices[0].tolist())

    return way


def demo_way(file: Path, x: torch.Tensor) -> Way:
    """The official demo: `torch.load`, then the encoder in fp32."""

    def way() -> list[int]:
        w = torch.load(file, map_location="cpu", weights_only=True)
        return sorted(torch.relu(x @ w["W_enc"].T + w["b_enc"]).topk(K).indices[0].tolist())

    return way


def sae_lens_way(folder: Path, x: torch.Tensor) -> Way:
    from sae_lens import SAE

    inner = next(folder.rglob("cfg.json")).parent

    def way() -> list[int]:
        return sorted(SAE.load_from_disk(inner).encode(x)[0].nonzero().flatten().tolist())

    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    x = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        file = files(root)
        gc.collect()
        ways: dict[str, Way] = {"qwen-scope": ours(root / "official", x), "official demo": demo_way(file, x)}
        add_peers(ways, {"sae_lens": sae_lens_way}, root / "sae_lens", x)
        wanted = ways["qwen-scope"]()
        for name, way in ways.items():
            if way() != wanted:
                raise SystemExit(f"{name} and qwen-scope find other features")
        floor = "reading the file's bytes"
        ways[floor] = reading(file)
        ways[floor]()
        times = alternate(ways, args.rounds)
        size = file.stat().st_size / 1e6
    goal = at_most(ratio(times, "qwen-scope", floor), GOAL)
    lines = [f"\n### Opening a layer of {size:.0f} MB and encoding one token, warm page cache\n"]
    write("open.py", lines + table(times, "qwen-scope", {floor: goal}), args.out)


if __name__ == "__main__":
    main()
