"""What features cost per generated token: reading them as tokens are made, reading them afterwards, and steering.

    python -m experiments.real.cost --model FOLDER [--sae FOLDER] [--rounds 1-6] [--write]

Greedy generation of a fixed number of tokens from one prompt, batch 1, one thread. Every round runs all conditions in
an order that rotates, and a figure compares conditions within a round, in processor time, which other work on the
machine moves less than the clock:

- plain: `model.generate` of transformers, without anything of ours; plain again: the same, as the control;
- read one, read all: SAEs encode the residual of every generated token as it is made, at the middle layer or at all;
- afterwards: plain, then one forward pass over the finished text and the SAE of the middle layer on its tokens;
- steered one, steered all: a feature added at the middle layer, or one at every layer;
- clamped one: a feature of the middle layer held at a value.

Without `--sae`, SAEs have random weights in bfloat16 of the released shape: sixteen features per dimension and k 50.
Whether what encoding takes depends on the weights shows where `--trained` names a folder with an SAE: it is timed on
one vector at a time beside random weights of its own shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope.model import HookPoint, LoadedModel, capture, changing, d_model, load_model, n_layers
from qwen_scope.sae import SAE, TopK, layers_of, load_sae
from qwen_scope.stats import ClusterSums, Interval
from qwen_scope.steer import Intervention, steering

PROMPT = "The history of the printing press begins"
AGAIN = "plain again"
WAYS = ("plain", AGAIN, "read one", "read all", "afterwards", "steered one", "steered all", "clamped one")
EXPANSION, K, ENCODED = 16, 50, 200
TITLE = "What features cost per generated token"


@dataclass(frozen=True)
class Sizes:
    """Tokens of one generation."""

    tokens: int = 16


@cache
def opened(model: Path, sae: Path | None) -> tuple[LoadedModel, dict[int, SAE]]:
    """The model in bfloat16 and an SAE of every layer that has one."""
    loaded = load_model(str(model), device="cpu", dtype="bfloat16")
    if sae is not None:
        return loaded, {layer: load_sae(str(sae), layer, dtype=torch.bfloat16) for layer in layers_of(str(sae))}
    shape = (EXPANSION * d_model(loaded.model), d_model(loaded.model))
    return loaded, {layer: random_sae(*shape, K, layer) for layer in range(n_layers(loaded.model))}


def random_sae(d_sae: int, width: int, k: int, seed: int) -> SAE:
    """Random directions of norm 1 as encoder and decoder, in bfloat16."""
    w = torch.randn(d_sae, width, generator=torch.Generator().manual_seed(seed))
    w = (w / w.norm(dim=1, keepdim=True)).to(torch.bfloat16)
    return TopK(w, w.T.contiguous(), torch.zeros(d_sae), torch.zeros(width), k)


def run(at: At[Sizes], round: int) -> Mapping[str, Any]:
    """Processor seconds and seconds of every way in one round."""
    torch.set_num_threads(1)
    loaded, saes = opened(at.options["model"], at.options["sae"])
    model: Any = loaded.model  # its `generate` comes from a mixin that the type does not show
    ids = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
    middle = sorted(saes)[len(saes) // 2]
    config = GenerationConfig(
        max_new_tokens=at.sizes.tokens, min_new_tokens=at.sizes.tokens, do_sample=False, pad_token_id=0,
        eos_token_id=loaded.tokenizer.eos_token_id,
    )  # fmt: skip

    def written() -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def reading(layers: list[int]) -> Callable[[], Any]:
        def read(h: Tensor, point: HookPoint) -> Tensor:
            if h.shape[1] == 1:  # a generated token, not the prompt
                saes[point.layer].encode(h[0])
            return h

        def way() -> None:
            with changing(model, {HookPoint(layer): read for layer in layers}):
                written()

        return way

    def steered(interventions: list[Intervention]) -> Callable[[], Any]:
        def way() -> None:
            with steering(model, interventions, saes, prompt_lengths=[ids.shape[1]]):
                written()

        return way

    def afterwards() -> None:
        found = capture(model, written(), [HookPoint(middle)])
        saes[middle].encode(found[HookPoint(middle)][0, ids.shape[1] :])

    ways = {
        "plain": written,
        AGAIN: written,
        "read one": reading([middle]),
        "read all": reading(sorted(saes)),
        "afterwards": afterwards,
        "steered one": steered([Intervention.add(layer=middle, feature=1, amount=1.0)]),
        "steered all": steered([Intervention.add(layer=layer, feature=1, amount=1.0) for layer in sorted(saes)]),
        "clamped one": steered([Intervention.clamp(layer=middle, feature=1, amount=1.0)]),
    }
    reading([middle])()  # what is made once, such as an encoder's cache, is not a token's
    order = WAYS[round % len(WAYS) :] + WAYS[: round % len(WAYS)]
    found = {name: timed(ways[name]) for name in order}
    found["layers"] = len(saes)
    if at.options["trained"] is not None:
        found["encoded"] = encoded(at.options["trained"])
    return found


def timed(way: Callable[[], Any]) -> list[float]:
    """Processor seconds and seconds of one call."""
    processor, clock = time.process_time(), time.perf_counter()
    way()
    return [time.process_time() - processor, time.perf_counter() - clock]


def encoded(folder: Path) -> list[float]:
    """Processor seconds of `ENCODED` vectors, one by one, by a trained SAE and by random weights of its shape."""
    sae = load_sae(str(folder), layers_of(str(folder))[-1], dtype=torch.bfloat16)
    assert sae.k is not None
    other = random_sae(sae.d_sae, sae.d_model, sae.k, 0)
    h = sae.W_dec.float().T[:ENCODED] * 20 + torch.randn(
        ENCODED, sae.d_model, generator=torch.Generator().manual_seed(1)
    )
    out = []
    for one in (sae, other):
        one.encode(h[:1])
        out.append(timed(lambda one=one: [one.encode(row[None]) for row in h])[0])
    return out


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    _, saes = opened(at.options["model"], at.options["sae"])
    sae = next(iter(saes.values()))
    sums = ClusterSums({name: np.array([row[name][0] for row in rows]) for name in WAYS})
    plain = float(np.mean([row["plain"][0] for row in rows])) / at.sizes.tokens

    def share(name: str) -> Interval:
        return sums.interval(lambda s: s[name] / s["plain"] - 1)

    cells = []
    for name in WAYS:
        processor, clock = (1000 * float(np.median([row[name][i] for row in rows])) / at.sizes.tokens for i in (0, 1))
        more = "" if name == "plain" else f"{share(name):+.1%}"
        cells.append([name, f"{processor:.1f}", f"{clock:.0f}", more])
    one, every, steer = (share(name) for name in ("read one", "read all", "steered one"))
    verdict = f"""Reading one layer's features as tokens are made costs {one:+.1%} of a generated token, all
        {rows[0]["layers"]} layers {every:+.1%}, steering with one feature {steer:+.1%}. The report publishes no
        figure of this."""
    kind = "SAEs of random weights" if at.options["sae"] is None else at.options["sae"].name
    also = " --trained FOLDER" if at.options["trained"] is not None else ""
    how = f"""`python -m experiments.real.cost --model FOLDER{also} --write`: {at.options["model"].name} in bfloat16
        with {kind} ({sae.d_sae:,} features, k {sae.k}, bfloat16) at {rows[0]["layers"]} layers, batch 1, one thread,
        {len(rows)} rounds of {at.sizes.tokens} tokens in rotating order. Medians of milliseconds per token; shares are
        of the plain token's {1000 * plain:.0f} ms of processor time, with 95% intervals over rounds. "Plain again" is
        the control: what differs there is the machine."""
    parts = [paragraph(verdict), paragraph(how), table(("way", "processor ms", "clock ms", "more than plain"), cells)]
    if "encoded" in rows[0]:
        pairs = ClusterSums({str(i): np.array([row["encoded"][i] for row in rows]) for i in (0, 1)})
        ratio = pairs.interval(lambda s: s["1"] / s["0"])
        text = f"""Whether it depends on the weights: random ones take {ratio.estimate:.2f} [{ratio.low:.2f},
            {ratio.high:.2f}] times what a trained SAE of the same shape takes ({at.options["trained"].name}),
            one vector at a time."""
        parts.append(paragraph(text))
    return "\n\n".join(parts)


experiment = Experiment(
    title=TITLE,
    varies={"round": tuple(range(1, 7))},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"round": (1, 2)},
    quick_sizes=Sizes(tokens=4),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "help": "the folder of its SAEs; without it, random weights of the released shape"},
        "trained": {"type": Path, "help": "a folder with a trained SAE, of whatever model, for the comparison"},
    },
)

if __name__ == "__main__":
    main(experiment)
