"""Shapes in public signatures are checked while the tests run; no test may reach the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidia0").exists():
    # Without a GPU Triton's kernels run in its interpreter; it asks when it is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for shapes, tiny, families

from jaxtyping import install_import_hook

# Not the lab: it has no tensors, and checking every call of its grammar would take most of the suite's time. Not the
# explorer: Gradio asks whether a handler is a generator function, which a checked one no longer says.
ROOMS = (
    "analysis",
    "cli",
    "corpus",
    "features",
    "foundry",
    "model",
    "posttrain",
    "report",
    "sae",
    "scope",
    "stats",
    "steer",
    "train",
)
install_import_hook([f"qwen_scope.{room}" for room in ROOMS], "shapes.check")
