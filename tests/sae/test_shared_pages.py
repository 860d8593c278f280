"""Processes of one machine that open one SAE share its weights in memory."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_toys import toy

from qwen_scope.sae import save_sae

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
READING = """
import sys
from qwen_scope.sae import load_sae
saes = [load_sae(folder) for folder in sys.argv[1:]]
for sae in saes:
    sae.check_finite("W_enc")  # reads every number
    sae.check_finite("W_dec")
print("read", flush=True)
sys.stdin.read()
"""


def mapped(pid: int, file: Path) -> dict[str, int]:
    """Bytes of a file in a process's memory (`Rss`), and these with shared ones divided by who shares them (`Pss`)."""
    found = {"Rss": 0, "Pss": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.split(":")[0] in found:
            found[line.split(":")[0]] += int(line.split()[1]) * 1024
    return found


def test_two_processes_hold_one_copy(tmp_path: Path) -> None:
    sae = toy(d_model=512, d_sae=4096, layer=0)
    files = []
    for layout, dtype in (("safetensors", torch.bfloat16), ("official", torch.float32)):
        folder = save_sae(replace(sae), tmp_path / layout, layout, dtype)
        files += list(folder.glob("layer0*"))
    command = [sys.executable, "-c", READING, *(str(file.parent) for file in files)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "read\n"
        for file in files:
            size = file.stat().st_size
            both = [mapped(reader.pid, file) for reader in readers]
            assert all(0.95 * size <= one["Rss"] <= 1.05 * size for one in both), (file, both)
            assert sum(one["Pss"] for one in both) <= 1.05 * size, (file, both)
    finally:
        for reader in readers:
            reader.communicate()
