"""One training step of each trainer on the same batch and weights: forward, backward, Adam, decoder renormalised.

python bench/train_step.py [--rounds 7]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from side_by_side import (
    PAGE,
    Way,
    add_peers,
    alternate,
    at_most,
    ratio,
    stub_for_dictionary_learning,
    table,
    write,
)

import torch  # isort: skip

from qwen_scope.sae import kernels  # isort: skip
from qwen_scope.train import TrainConfig  # isort: skip
from qwen_scope.train.parallel import Ranks  # isort: skip
from qwen_scope.train.step import Layer, start, step  # isort: skip

D_MODEL, D_SAE, K, TOKENS = 512, 8192, 64, 2048
GOAL = 1.6
# With AuxK, one feature in this many is dead.
DEAD = 16
LONG = 10**9


def batch() -> torch.Tensor:
    """Residuals of unit variance, sums of a few of many directions, so that there is something to learn."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * D_MODEL, D_MODEL, generator=g)
    weights = torch.rand(TOKENS, 4 * D_MODEL, generator=g)
    weights *= torch.rand(TOKENS, 4 * D_MODEL, generator=g) < 0.02
    x = weights @ directions
    return x / x.square().mean().sqrt()


def dead_mask() -> torch.Tensor:
    return torch.arange(D_SAE) % DEAD == 0


def ours(x: torch.Tensor, dead: bool) -> tuple[Layer, Way]:
    # No input scale, so that every trainer reads the same numbers.
    config = TrainConfig(d_sae=D_SAE, k=K, tokens=10**9, batch=TOKENS, scale_input=False)
    layer = start(config, "layers.0", x, Ranks())

    def way() -> None:
        if dead:
            layer.silent[dead_mask()] = LONG
        step(config, layer, x, 1e-4, Ranks())

    return layer, way


def sae_lens_way(x: torch.Tensor, layer: Layer, dead: bool) -> tuple[Callable[[], torch.Tensor], Way]:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, k=K, apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=False
    )
    sae, w = TopKTrainingSAE(config), layer.weights
    parts = {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    for name, value in parts.items():
        getattr(sae, name).data.copy_(value)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4)
    mask = dead_mask() if dead else None

    def way() -> None:
        given = TrainStepInput(x, {}, mask, 0, False)
        found = sae.training_forward_pass(given)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)  # its own steps leave this out

    return lambda: sae(x), way


def sparsify_way(x: torch.Tensor, layer: Layer, dead: bool) -> tuple[Callable[[], torch.Tensor], Way]:
    from sparsify import SparseCoder, SparseCoderConfig

    sae, w = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=D_SAE, k=K)), layer.weights
    sae.encoder.weight.data.copy_(w.W_enc)
    sae.encoder.bias.data.copy_(w.b_enc)
    sae.W_dec.data.copy_(w.W_dec)
    sae.b_dec.data.copy_(w.b_dec)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4)
    mask = dead_mask() if dead else None

    def way() -> None:
        out = sae(x, dead_mask=mask)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return lambda: sae(x).sae_out, way


def dictionary_learning_way(x: torch.Tensor, layer: Layer, dead: bool) -> tuple[Callable[[], torch.Tensor], Way]:
    stub_for_dictionary_learning()
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=D_MODEL, dict_size=D_SAE, k=K, layer=0, lm_name="bench", device="cpu", lr=1e-4
    )
    ae, w = trainer.ae, layer.weights
    ae.encoder.weight.data.copy_(w.W_enc)
    ae.encoder.bias.data.copy_(w.b_enc)
    ae.decoder.weight.data.copy_(w.W_dec.T)
    ae.b_dec.data.copy_(w.b_dec)

    def way() -> None:
        if dead:
            trainer.num_tokens_since_fired[dead_mask()] = LONG
        trainer.update(1, x)  # at step 0 it would look for a median

    return lambda: ae(x), way


def measure(x: torch.Tensor, dead: bool, rounds: int) -> list[str]:
    layer, way = ours(x, dead)
    sae = start_sae(layer)
    wanted = sae(x)
    made: dict = {}
    makers = {
        "sae_lens": sae_lens_way, "sparsify": sparsify_way, "dictionary_learning": dictionary_learning_way,
    }  # fmt: skip
    add_peers(made, makers, x, layer, dead)
    ways: dict[str, Way] = {"qwen-scope": way}
    for name, (reconstruct, theirs) in made.items():
        with torch.no_grad():
            apart = (reconstruct() - wanted).norm() / wanted.norm()
        if not apart < 1e-4:
            raise SystemExit(f"{name} and qwen-scope reconstruct {float(apart):.2g} apart from the same weights")
        ways[name] = theirs
    W, b = layer.weights.W_enc.detach(), layer.weights.b_enc.detach()
    product, fast = "one fp32 encoder product", "the same product as qwen-scope takes it on this CPU"
    with_grad_off = torch.no_grad()
    ways[product] = with_grad_off(lambda: torch.nn.functional.linear(x, W, b))
    ways[fast] = with_grad_off(lambda: kernels.linear_fp32(x, W, b))
    for name in (product, fast):
        ways[name]()
    way()
    times = alternate(ways, rounds)
    goal = at_most(ratio(times, "qwen-scope", product), GOAL)
    note = f", AuxK with {D_SAE // DEAD:,} dead features" if dead else ""
    title = f"\n### {TOKENS:,} tokens, d_model {D_MODEL}, d_sae {D_SAE:,}, k {K}, fp32{note}\n"
    return [title, *table(times, "qwen-scope", {product: goal})]


def start_sae(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reconstruction by these weights, as the formula says it."""
    w = layer.weights

    @torch.no_grad()
    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        pre = torch.relu((x - w.b_dec) @ w.W_enc.T + w.b_enc)
        top = pre.topk(K, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values) @ w.W_dec + w.b_dec

    return reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    x = batch()
    lines = measure(x, False, args.rounds)
    lines += measure(x, True, args.rounds)
    write("train_step.py", lines, args.out)


if __name__ == "__main__":
    main()
