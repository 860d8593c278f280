"""The scoreboard of an SAE of the lab and of SAEs that peers trained on the same residuals.

    python -m experiments.lab.scoreboard [--saes lab,qwen-scope,sae_lens,sparsify,dictionary_learning] [--write]

`lab` is the bundled SAE of layer 4 on the lab's text, labelled by its columns language and register, beside controls
of the same width and k that our trainer makes. The others are trained by `experiments.lab.trainers` with their own
defaults on the same residuals of layer 3, each peer in its environment (`tests/peers/run.sh PEER`), and measured
without controls. Settings were fixed before the figures that are reported; a star says where a control is not worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.harness import At, Experiment, Row, main
from experiments.lab import trainers
from experiments.scoreboards import measured, told
from experiments.sections import paragraph
from qwen_scope.sae import Identity, TopK, fingerprint, save_sae
from qwen_scope.score import ScoreRun

LAYER = 4
TITLE = "Scoreboards of the lab's SAEs and of peers'"


@dataclass(frozen=True)
class Sizes:
    """Tokens of measuring and of the controls, texts per dataset, and what trainers get."""

    tokens: int = 8192
    train_tokens: int = 50_000
    batch: int = 1024
    rows: int = 280
    trained: int = 150_000
    d_sae: int = 1024
    k: int = 32


def run(at: At[Sizes], sae: str) -> dict[str, Any]:
    """The scoreboard of one SAE; a part of it that the folder holds is not measured again."""
    sizes = at.sizes
    place, layer = ("lab", LAYER) if sae == "lab" else (str(_trained(at, sae)), trainers.LAYER)
    return measured(
        ScoreRun(
            place, "lab", at.folder / f"score-{sae}", layers=(layer,), columns=("language", "register"),
            rows=sizes.rows, tokens=sizes.tokens, train_tokens=sizes.train_tokens, batch=sizes.batch,
            controls=sae == "lab",
        )
    )  # fmt: skip


def _trained(at: At[Sizes], trainer: str) -> Any:
    """The folder of an SAE that a trainer made."""
    place = at.folder / f"sae-{trainer}"
    if not place.is_dir():
        sizes = trainers.Sizes(at.sizes.trained, 8192, 1024, at.sizes.d_sae, at.sizes.k)
        inner = At(sizes, {}, {}, at.folder)
        trainers.run(inner, trainer, "defaults")
        w = load_file(at.folder / "weights.safetensors")
        weights = {name: w[name].float().contiguous() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        identity = Identity(f"SAE-{trainer}", trainers.LAYER, fingerprint(**weights))
        made = TopK(**weights, k=sizes.k, hook_point=f"layers.{trainers.LAYER}.resid_post", identity=identity)
        with torch.no_grad():
            save_sae(made, place, layout="safetensors")
    return place


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    sizes = at.sizes
    how = f"""`python -m experiments.lab.scoreboard --write`: {sizes.tokens:,} tokens of the lab's held-out text,
        controls of {sizes.train_tokens:,} tokens, labelled texts by the columns language and register ({sizes.rows} per
        dataset). `lab` is the bundled SAE of layer {LAYER}; the others were trained on {sizes.trained:,} tokens of
        layer {trainers.LAYER}, width {sizes.d_sae:,}, k {sizes.k}, with the trainer's own defaults, and are measured
        without controls. A star marks a control that is not worse."""
    parts = [paragraph(how)]
    for row in rows:
        parts += [f"### {row['sae']}", told(row["tables"], row["unmeasured"])]
    return "\n\n".join(parts)


experiment = Experiment(
    title=TITLE,
    varies={"sae": ("lab", "qwen-scope", *trainers.PEERS)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"sae": ("lab",)},
    quick_sizes=Sizes(tokens=2048, train_tokens=1024, rows=56),
)

if __name__ == "__main__":
    main(experiment)
