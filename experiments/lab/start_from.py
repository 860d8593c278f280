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
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.harness import At, Experiment, Row, main
from experiments.lab.tuned import LR, fine_tune
from experiments.sections import paragraph, table
from qwen_scope.model import HookPoint, load_model, measure_counted
from qwen_scope.sae import SAE, load_sae
from qwen_scope.stats import bootstrap
from qwen_scope.text import Corpus, TokenRows
from qwen_scope.train import ResidualBuffer, ResidualTable, TrainConfig, train

LANGUAGES = {1: "ja", 2: "ru", 3: "es", 4: "zh", 5: "ar", 6: "fr"}
LAYER, FIFTH, HOLD_OUT, BATCH, ROW, ROWS = 3, 5, 20, 2048, 256, 16
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
    loaded, point = load_model(out / "model", device="cpu"), HookPoint(LAYER)

    def rows(held_out: bool) -> TokenRows:
        corpus = Corpus("lab", seed=FIRST_SEED + seed, hold_out=HOLD_OUT, held_out=held_out, shuffle=seed)
        return TokenRows(corpus, loaded.tokenizer, context_length=ROW, batch_size=ROWS)

    first = iter(rows(False))
    counted = measure_counted(loaded.model, loaded.tokenizer, chain([next(first)], first), sample="the lab's texts")
    found = []
    for tokens, held_out in ((at.sizes.tokens, False), (at.sizes.held_out, True)):
        buffer = ResidualBuffer(
            loaded.model, rows(held_out), [point], batch=BATCH, most=tokens + 2 * BATCH, seed=seed, counted=counted
        )
        x = torch.cat([batch[str(point)] for batch in islice(iter(buffer), tokens // BATCH + 2)])
        found.append(x[~counted.sinks(x, point)][: tokens // BATCH * BATCH])
    torch.save(tuple(found), kept)
    return found[0], found[1]


def fvu_of(sae: SAE, x: Tensor) -> float:
    """The fraction of variance that the reconstruction of `x (n, d_model)` leaves unexplained."""
    return float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())


def run(at: At[Sizes], seed: int, arm: str) -> Mapping[str, Any]:
    """One SAE: trained, and measured."""
    torch.set_num_threads(1)
    x, held = residuals(at, seed)
    base, name = load_sae("lab", LAYER), str(HookPoint(LAYER))
    assert base.k is not None
    sae, config = base, None
    if arm != "as it is":
        tokens = len(x) if arm == "scratch" else len(x) // FIFTH // BATCH * BATCH
        config = TrainConfig(d_sae=base.d_sae, k=base.k, tokens=tokens, batch=BATCH, seed=seed)
        config = config.continuing() if arm == "continued" else config
        begun = {name: base} if arm == "continued" else None
        sae = train(config, ResidualTable({name: x[:tokens]}, batch=BATCH, seed=seed), init=begun)[name]
    cosines = torch.cosine_similarity(sae.W_dec.float(), base.W_dec.float(), dim=0)
    return {
        "fvu": fvu_of(sae, held),
        "tokens": 0 if config is None else config.tokens,
        "lr": 0.0 if config is None else config.peak_lr,
        "cosine": float(cosines.median()),
        "below": float((cosines < 0.5).float().mean()),
    }


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    found = {(row["seed"], row["arm"]): row for row in rows}
    seeds = [seed for seed in sorted({row["seed"] for row in rows}) if all((seed, arm) in found for arm in ARMS)]
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
    interval = bootstrap(np.array(gaps))
    met = sum(gap <= 0 for gap in gaps)
    verdict = f"""Continued less from scratch: {interval} over {len(gaps)} seeds. The rule holds for {met} of
        {len(gaps)} seeds, so it {"is met" if met == len(gaps) else "is not met"}."""
    return "\n\n".join([paragraph(how), table(columns, lines), paragraph(verdict)])


experiment = Experiment(
    title=TITLE,
    varies={"seed": (1, 2, 3), "arm": ARMS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (1,)},
    quick_sizes=Sizes(tokens=40_960, held_out=4096, texts=32),
)

if __name__ == "__main__":
    main(experiment)
