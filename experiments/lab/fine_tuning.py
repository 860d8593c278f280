"""What the fine-tunings of the benchmarks have in common."""

from __future__ import annotations

from typing import Any

QUIET: dict[str, Any] = {
    "max_length": 256,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Settings of TRL's `SFTConfig`: the lab's model on the CPU, in float32, with nothing written and no bars."""
