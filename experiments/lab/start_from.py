"""SAEs of a base model, continued on a fine-tuned checkpoint: do they reach in a fifth of the tokens what new ones do?

    python -m experiments.lab.start_from [--seeds 1,2,3] [--arms scratch,continued] [--write]

Each seed fine-tunes the bundled model on another language (`experiments.lab.tuned`) and draws other text of the whole
lab. Three arms on the residuals of one layer of that checkpoint: an SAE from scratch on all tokens by the defaults of
`TrainConfig`; the bundled SAE of the base, continued on the first fifth of the same tokens by the defaults of
`TrainConfig.continuing`; and an SAE from scratch on that fifth. Measured on held-out documents, also the bundled SAE as
it is. The rule: of every seed, the FVU of the continued SAE is at most that of the one from scratch on all tokens.

The learning rate of continuing was chosen on a fine-tuning on German, which is not among the seeds (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.continuing import (
    HELD_OUT,
    HOLD_OUT,
    TRAINING,
    config_of,
    cosines_of,
    fvu_of,
    residuals_of,
    rule_in_words,
    tokens_of,
    trained,
    whole_seeds,
)
from experiments.harness import At, Experiment, Row, main
from experiments.lab.tuned import LR, fine_tune
from experiments.sections import paragraph, table
from qwen_scope.model import HookPoint, load_model
from qwen_scope.sae import load_sae
from qwen_scope.text import Corpus

LANGUAGES = {1: "ja", 2: "ru", 3: "es", 4: "zh", 5: "ar", 6: "fr"}
LAYER = 3
FIRST_SEED = 8000  # of the lab's documents, which neither the base nor its SAEs have seen
ARMS = ("scratch", "continued", "scratch on a fifth", "as it is")
TITLE = "SAEs continued on a fine-tuned checkpoint"


@dataclass(frozen=True)
class Sizes:
    """Training tokens, held-out tokens, and texts of the fine-tuning."""

    tokens: int = 512_000
    held_out: int = 20_480
    texts: int = 1000


def residuals(at: At[Sizes], seed: int) -> tuple[Tensor, Tensor]:
    """Residuals of the fine-tuned checkpoint to train on, in the order of training, and held-out ones; made once."""
    kept = at.folder / f"residuals-{seed}.pt"
    if kept.is_file():
        return torch.load(kept)
    out = at.folder / f"tuned-{seed}"
    if not (out / "model" / "config.json").is_file():
        fine_tune(out, LANGUAGES[seed], seed, at.sizes.texts)
    found = residuals_of(
        load_model(out / "model", device="cpu"),
        lambda held_out: Corpus("lab", seed=FIRST_SEED + seed, hold_out=HOLD_OUT, held_out=held_out, shuffle=seed),
        HookPoint(LAYER),
        {TRAINING: at.sizes.tokens, HELD_OUT: at.sizes.held_out},
        seed=seed,
        sample="the lab's texts",
    )
    torch.save((found[TRAINING], found[HELD_OUT]), kept)
    return found[TRAINING], found[HELD_OUT]


def run(at: At[Sizes], seed: int, arm: str) -> Mapping[str, Any]:
    """One SAE: trained, and measured."""
    torch.set_num_threads(1)
    x, held = residuals(at, seed)
    base = load_sae("lab", LAYER)
    sae, tokens, rate = base, 0, 0.0
    if arm != "as it is":
        tokens, continued = tokens_of(arm, x, ["scratch"]), arm == "continued"
        sae = trained(base, x[:tokens], HookPoint(LAYER), seed, continued=continued)
        rate = config_of(base, tokens, seed, continued=continued).peak_lr
    cosines = cosines_of(sae, base)
    return {
        "fvu": fvu_of(sae, held),
        "tokens": tokens,
        "lr": rate,
        "cosine": float(cosines.median()),
        "below": float((cosines < 0.5).float().mean()),
    }


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    found, seeds = whole_seeds(rows, ARMS)
    if not seeds:
        return "No seed has all arms yet."
    lines, gaps = [], []
    for seed in seeds:
        one = {arm: found[seed, arm] for arm in ARMS}
        gaps.append(one["continued"]["fvu"] - one["scratch"]["fvu"])
        figures = [f"{one[arm]['fvu']:.4f}" for arm in ("as it is", "scratch on a fifth", "continued", "scratch")]
        moved = f"{one['continued']['cosine']:.3f}"
        lines.append([f"{seed} ({LANGUAGES[seed]})", *figures, f"{gaps[-1]:+.4f}", moved])
    tokens = {arm: found[seeds[0], arm]["tokens"] for arm in ("continued", "scratch")}
    how = f"""`python -m experiments.lab.start_from --write`: the bundled model is fine-tuned on {at.sizes.texts:,}
        texts and chats of one language (every weight, peak learning rate {LR:g}; another language and other texts for
        each seed). For that checkpoint an SAE of layer {LAYER} is made on documents of the whole lab: from scratch on
        {tokens["scratch"]:,} tokens; continued from the bundled SAE of the base on the first {tokens["continued"]:,} of
        the same residuals; and from scratch on those. Each by its own defaults and with its own schedule. FVU on
        {at.sizes.held_out:,} held-out tokens; the cosine is the median over features of decoder directions before and
        after. The rule, fixed before the runs: for every seed, the continued SAE's FVU is at most that of the one from
        scratch on all tokens."""
    columns = ("seed", "base SAE as it is", "scratch, a fifth", "continued, a fifth", "scratch", "difference", "cosine")
    return "\n\n".join([paragraph(how), table(columns, lines), paragraph(rule_in_words(gaps))])


experiment = Experiment(
    title=TITLE,
    varies={"seed": (1, 2, 3), "arm": ARMS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (1, 2)},
    quick_sizes=Sizes(tokens=40_960, held_out=4096, texts=32),
)

if __name__ == "__main__":
    main(experiment)
