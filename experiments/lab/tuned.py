"""Checkpoints of the bundled model that were fine-tuned on one language: what a user has whose SAEs are of the base.

    python -m experiments.lab.tuned OUT [--language ja] [--seed 1]

writes one into OUT/model. Plain fine-tuning of every weight by `posttrain.run_sft` on the lab's talk and chats in one
language, from a seed of documents that no other experiment draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_scope.lab import LANGUAGES, documents
from qwen_scope.posttrain import SFTRun, lab_samples, run_sft

SAMPLES, BATCH, LR, MAX_LENGTH = 1000, 16, 5e-4, 256
FIRST_SEED = 7000


def fine_tune(out: Path, language: str, seed: int, samples: int = SAMPLES, **settings: Any) -> Mapping[str, Any]:
    """Fine-tune the lab's model on one language into `out/model`; what the run says at its end.

    Args:
        settings: of `SFTRun`, in place of the constants above.
    """
    learnt = lab_samples(documents(seed=FIRST_SEED + seed, n=samples, kinds=["talk", "chat"], languages=[language]))
    # Chats are left as text here: one run takes samples of one kind.
    texts = [{"text": one.get("text") or one["prompt"] + one["completion"], "group": one["group"]} for one in learnt]
    run = SFTRun(
        **{
            "model": "lab", "out": out, "method": "plain", "lr": LR, "batch": BATCH, "accumulate": 1, "warmup": 20,
            "max_length": MAX_LENGTH, "seed": seed, "checkpointing": False, "bf16": False, "save_every": 0,
            "device": "cpu", "dtype": "float32",
        }
        | settings
    )  # fmt: skip
    return run_sft(run, texts)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("out", type=Path)
    ask.add_argument("--language", choices=LANGUAGES, default="ja")
    ask.add_argument("--seed", type=int, default=1)
    given = ask.parse_args()
    print(fine_tune(given.out, given.language, given.seed))
