"""The scoreboard's figures where the features are known: do they put the truth first and controls last?

    python -m experiments.lab.planted_dictionary [--seeds 0,1] [--write]

Residuals of a synthetic generator (`experiments.synthetic`): 24 root features with a child each in 64 dimensions,
Zipf's frequencies, correlated firing, noise. Dictionaries: the truth; a TopK SAE trained by our trainer; the three
controls of the scoreboard. A text is 12 tokens in which one feature fires throughout; classes of `tpp` and subjects
of `contrast` are the five commonest roots, pairs of `scr` are two roots each. "Recovered" is the mean over true
features of the largest cosine with a direction of the dictionary, which is what figures are compared with. Fixed
before the run: a figure ranks well if, in every world, the truth is above every control (for dead features, not above
any).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from experiments.synthetic import Planted, planted
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE
from qwen_scope.score import Bags, contrast, scr, tpp, train_probes
from qwen_scope.score.controls import FROZEN
from qwen_scope.score.perturb import OTHER, spurious
from qwen_scope.train import TrainConfig, evaluate_residuals, train

TITLE = "Scoreboards on planted truth"
POINT = HookPoint(0)
DICTIONARIES = ("truth", "trained", *FROZEN)
LENGTH, CLASSES, NS = 12, 5, (1, 2, 5)
PAIRS = ((0, 1), (2, 3))
FIGURES = (
    "recovered",
    "explained_variance",
    "l0",
    "dead",
    "tpp 1",
    "tpp 2",
    "tpp 5",
    "scr 1",
    "scr 2",
    "scr 5",
    "contrastive",
)


@dataclass(frozen=True)
class Sizes:
    """Tokens of training and of measuring, texts of a class or quadrant, and the width and k of what is trained."""

    tokens: int = 100_000
    measured: int = 16_384
    texts: int = 200
    d_sae: int = 64
    k: int = 6
    batch: int = 1024


def dictionary(name: str, world: Planted, sizes: Sizes, seed: int) -> SAE:
    """The truth, an SAE or a control, trained on the same tokens."""
    if name == "truth":
        return world.truth()
    config = TrainConfig(d_sae=sizes.d_sae, k=sizes.k, tokens=sizes.tokens, batch=sizes.batch, seed=seed)
    if name in FROZEN:
        config = replace(config, frozen=FROZEN[name])
    steps = 1 if name == "random directions" else config.steps
    config = replace(config, tokens=steps * sizes.batch)
    batches: Iterable[dict[str, Tensor]] = (
        {str(POINT): world.draw(sizes.batch, 1000 * (seed + 1) + i)[0]} for i in range(steps)
    )
    return train(config, batches)[str(POINT)]


def texts(world: Planted, wanted: Callable[[Tensor], Tensor], n: int, seed: int) -> Tensor:
    """`n` texts `(n, LENGTH, d_model)` of tokens that fit, such as those in which a feature fires."""
    found, have, at = [], 0, 0
    while have < n * LENGTH:
        x, acts = world.draw(8192, 10**6 * (seed + 1) + at)
        found.append(x[wanted(acts)])
        have, at = have + len(found[-1]), at + 1
    return torch.cat(found)[: n * LENGTH].view(n, LENGTH, -1)


def fires(a: int, b: int, i: int, j: int, acts: Tensor) -> Tensor:
    """Where feature `a` fires or not, and `b`."""
    return ((acts[:, a] > 0) == bool(i)) & ((acts[:, b] > 0) == bool(j))


def bags(h: Tensor) -> Bags:
    return Bags(h.flatten(0, 1), torch.full((len(h),), h.shape[1]))


def run(at: At[Sizes], seed: int, name: str) -> dict[str, Any]:
    """Every figure of one dictionary in one world."""
    sizes, world = at.sizes, planted(seed=seed)
    sae = dictionary(name, world, sizes, seed)
    x, _ = world.draw(sizes.measured, 77 + seed)
    quality = evaluate_residuals(sae, lambda: [(x, torch.zeros(len(x), dtype=torch.bool))])
    cosines = normalize(world.directions, dim=-1) @ normalize(sae.W_dec.float(), dim=0)
    found = {"recovered": float(cosines.amax(1).mean())}
    found |= {one: float(getattr(quality, one)) for one in ("explained_variance", "l0", "dead")}
    n, cut = sizes.texts, sizes.texts * 5 // 7
    h = {str(f): texts(world, lambda acts, f=f: acts[:, f] > 0, n, seed + f) for f in range(CLASSES)}
    sides = [{f: bags(one[part]) for f, one in h.items()} for part in (slice(0, cut), slice(cut, n))]
    found |= tpp(sae, train_probes(sides[0], sides[1], None), NS)
    found |= _scr(world, sae, n, cut, seed)
    pairs = {f: (bags(one[:20]), bags(h[str((int(f) + 1) % CLASSES)][20:40])) for f, one in h.items()}
    return found | contrast(sae, pairs)


def _scr(world: Planted, sae: SAE, n: int, cut: int, seed: int) -> dict[str, float]:
    """The mean over pairs of roots."""
    found: list[dict[str, float]] = []
    for a, b in PAIRS:
        h = {(i, j): texts(world, partial(fires, a, b, i, j), n, seed + 50) for i in (1, 0) for j in (1, 0)}
        sides = []
        for part in (range(cut), range(cut, n)):
            chosen = spurious({which: [(which, i) for i in part] for which in h})
            sides.append({name: bags(torch.stack([h[w][i] for w, i in some])) for name, some in chosen.items()})
        found.append(scr(sae, train_probes(sides[0], sides[1], OTHER), NS))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    seeds = sorted({row["seed"] for row in rows})
    of = {(row["name"], row["seed"]): row for row in rows}
    cells = []
    for figure in FIGURES:
        values = [float(np.mean([of[name, seed][figure] for seed in seeds])) for name in DICTIONARIES]
        sign = -1 if figure == "dead" else 1
        well = all(
            sign * of["truth", seed][figure] > sign * of[name, seed][figure] - (figure == "dead") * 1e-9
            for seed in seeds
            for name in FROZEN
        )
        said = "" if figure == "l0" or np.isnan(values).any() else "yes" if well else "no"
        cells.append((figure, *("undefined" if np.isnan(value) else f"{value:.3f}" for value in values), said))
    sizes = at.sizes
    how = f"""`python -m experiments.lab.planted_dictionary --write`: 24 root features with a child each in 64
        dimensions, Zipf's frequencies, correlated firing, noise; {len(seeds)} worlds. Trained dictionaries have
        {sizes.d_sae} features, k {sizes.k} and {sizes.tokens:,} tokens. "Recovered" is the mean over true features of
        the largest cosine with a direction of the dictionary. The last column: whether in every world the truth is
        better than every control (for dead features, not worse). `scr` is undefined where the biased probe knows as
        much of either attribute."""
    return f"{paragraph(how)}\n\n{table(('figure', *DICTIONARIES, 'truth above controls'), cells)}"


experiment = Experiment(
    title=TITLE,
    varies={"seed": (0, 1), "name": DICTIONARIES},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (0,)},
    quick_sizes=Sizes(tokens=20_480, measured=2048, texts=40),
)

if __name__ == "__main__":
    main(experiment)
