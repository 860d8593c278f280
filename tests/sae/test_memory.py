"""What opening and using a half-gigabyte layer adds to memory, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_toys import toy

from qwen_scope.sae import Identity, TopK, save_sae

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
D_SAE, D_MODEL = 32_768, 2_048
BYTES = 2 * D_SAE * D_MODEL * 4


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of true 1.7B shape: as released (`plain`, without this package's config) and converted."""
    root = tmp_path_factory.mktemp("big")
    weights = [
        torch.rand(D_SAE, D_MODEL) - 0.5,
        torch.rand(D_MODEL, D_SAE) - 0.5,
        torch.rand(D_SAE),
        torch.rand(D_MODEL),
    ]
    sae = TopK(*weights, k=50, identity=Identity("SAE-Res-Big-W32K-L0_50", 0, toy().identity.fingerprint))
    save_sae(sae, root / "plain-L0_50")
    (root / "plain-L0_50" / "config.json").unlink()
    save_sae(sae, root / "safetensors", "safetensors")
    save_sae(sae, root / "bf16", "safetensors", torch.bfloat16)
    return root


def added(folder: Path, then: str) -> int:
    """Bytes that loading from `folder` and then doing `then` adds to the peak of the resident memory."""
    code = (
        "import resource, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from sae_toys import toy\n"
        "from qwen_scope.sae import load_sae, save_sae\n"
        "import tempfile\n"
        "def peak():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "with tempfile.TemporaryDirectory() as small:\n"  # warm up: imports, threads, allocator
        "    for layout in ('official', 'safetensors'):\n"
        "        save_sae(toy(), f'{small}/{layout}', layout)\n"
        "        one = load_sae(f'{small}/{layout}')\n"
        "        one.decode(one.encode(torch.ones(1, 16)))\n"
        "before = peak()\n"
        f"sae = load_sae({str(folder)!r})\n"
        f"x = torch.ones(1, {D_MODEL})\n"
        f"{then}\n"
        "sys.stdout.write(str(peak() - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("folder", ["plain-L0_50", "safetensors"])
def test_one_token_costs_at_most_the_file_and_a_tenth(big: Path, folder: str) -> None:
    assert added(big / folder, "sae.decode(sae.encode(x))") <= 1.1 * BYTES


def test_a_bf16_layer_is_never_widened_as_a_whole(big: Path) -> None:
    assert added(big / "bf16", "sae.decode(sae.encode(x))") <= 1.1 * BYTES / 2 + 2 * 64 * 2**20


@pytest.mark.parametrize(("folder", "size"), [("plain-L0_50", BYTES), ("safetensors", BYTES), ("bf16", BYTES / 2)])
def test_opening_without_using_costs_at_most_a_tenth(big: Path, folder: str, size: float) -> None:
    assert added(big / folder, "") <= 0.1 * size
