"""Residuals through an SAE and back: encode and decode, and decode with its gradient, beside the peers' own.

python bench/encode_decode.py [--tokens 4096] [--rounds 3]
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
    at_least,
    at_most,
    bare_product,
    memory,
    ratio,
    table,
    tensors,
    write,
)

import torch  # isort: skip

from qwen_scope.sae import FeatureActs, TopK  # isort: skip

# d_model, d_sae, k, tokens; the second on a GPU, with TF32 off.
ON_CPU, ON_GPU = (2048, 32768, 100, 4096), (5120, 81920, 50, 16384)
GOAL = 3.0
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sae_lens_ways(x: torch.Tensor, sae: TopK) -> tuple[Way, Decode]:
    from sae_lens import TopKSAE, TopKSAEConfig

    with torch.device("meta"):
        theirs = TopKSAE(TopKSAEConfig(d_in=sae.d_model, d_sae=sae.d_sae, k=sae.k, apply_b_dec_to_input=False))
    parts = {"W_enc": sae.W_enc.T.contiguous(), "W_dec": sae.W_dec.T.contiguous()}
    for name, value in {**parts, "b_enc": sae.b_enc, "b_dec": sae.b_dec}.items():
        setattr(theirs, name, torch.nn.Parameter(value, requires_grad=False))

    def decode(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return theirs.decode(values.new_zeros(len(values), sae.d_sae).scatter(1, indices, values))

    return lambda: theirs(x), decode


def sparsify_ways(x: torch.Tensor, sae: TopK) -> tuple[Way, Decode]:
    from sparsify import SparseCoder, SparseCoderConfig

    theirs = SparseCoder(sae.d_model, SparseCoderConfig(num_latents=sae.d_sae, k=sae.k), device="meta", decoder=False)
    theirs.encoder.weight = torch.nn.Parameter(sae.W_enc, requires_grad=False)
    theirs.encoder.bias = torch.nn.Parameter(sae.b_enc, requires_grad=False)
    theirs.W_dec = torch.nn.Parameter(sae.W_dec.T.contiguous(), requires_grad=False)
    # It subtracts its b_dec before it encodes, which these SAEs do not: zero, and added afterwards.
    theirs.b_dec = torch.nn.Parameter(torch.zeros_like(sae.b_dec), requires_grad=False)

    def forward() -> torch.Tensor:
        found = theirs.encode(x)
        return theirs.decode(found.top_acts, found.top_indices) + sae.b_dec

    return forward, lambda values, indices: theirs.decode(values, indices) + sae.b_dec


def demo_ways(x: torch.Tensor, sae: TopK) -> tuple[Way, Decode]:
    """The official demo's encoder, and the card's dense decoder."""

    def decode(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(values), sae.d_sae).scatter(1, indices, values) @ sae.W_dec.T + sae.b_dec

    def forward() -> torch.Tensor:
        found = torch.relu(x @ sae.W_enc.T + sae.b_enc).topk(sae.k, dim=-1)
        return decode(found.values, found.indices)

    return forward, decode


def ours_ways(x: torch.Tensor, sae: TopK) -> tuple[Way, Decode]:
    return (
        lambda: sae.decode(sae.encode(x)),
        lambda values, indices: sae.decode(FeatureActs(indices.int(), values, sae.d_sae)),
    )


def gradient_of(decode: Decode, acts: FeatureActs) -> Way:
    """A reconstruction and the gradient of half its square in the activations."""
    indices = acts.indices.long()

    def way() -> tuple[torch.Tensor, torch.Tensor]:
        values = acts.values.clone().requires_grad_()
        with torch.enable_grad():
            out = decode(values, indices)
            (gradient,) = torch.autograd.grad(out.square().sum() / 2, values)
        return out.detach(), gradient

    return way


def check(name: str, answer: torch.Tensor, ours: torch.Tensor) -> None:
    """Raise unless every row is the same within fp32 rounding."""
    apart = (answer - ours).norm(dim=1) / ours.norm(dim=1)
    if not (apart < 1e-4).all():
        raise SystemExit(f"{name} and qwen-scope differ by {float(apart.max()):.2g} of a row's norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="by default 4,096, and 16,384 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d_model, d_sae, k, tokens = ON_GPU if device == "cuda" else ON_CPU
    tokens = args.tokens or tokens
    x, W, b = tensors(d_model, d_sae, tokens, device)
    g = torch.Generator(device).manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(d_model, d_sae, generator=g, device=device), dim=0)
    sae = TopK(W, W_dec, b, torch.randn(d_model, generator=g, device=device), k=k)
    makers = {"sae_lens": sae_lens_ways, "sparsify": sparsify_ways, "official demo": demo_ways}
    made: dict = {"qwen-scope": ours_ways(x, sae)}
    add_peers(made, makers, x, sae)
    ours = made["qwen-scope"][0]()
    for name, (forward, _) in made.items():
        check(name, forward(), ours)
    extra = memory(made["qwen-scope"][0]) if device == "cpu" else 0
    ways = {name: forward for name, (forward, _) in made.items()}
    times = alternate({**ways, "bare bf16 product": bare_product(x, W)}, args.rounds)
    verdicts = {}
    if "sae_lens" in times:
        verdicts["sae_lens"] = at_least(ratio(times, "sae_lens", "qwen-scope"), GOAL)
    lines = [f"\n### Encode and decode, {tokens:,} tokens, d_model {d_model:,}, d_sae {d_sae:,}, k {k}\n"]
    lines += [f"{extra / 2**20:.0f} MB of extra peak memory.\n"] if extra else []
    lines += table(times, "qwen-scope", verdicts)
    write("encode_decode.py", lines, args.out)

    few = 1024
    acts = sae.encode(x[:few])
    turned = sae.by_feature()
    made["qwen-scope, by_feature()"] = ours_ways(x, turned)
    gradients = {name: gradient_of(decode, acts) for name, (_, decode) in made.items()}
    out, gradient = gradients["qwen-scope"]()
    for name, way in gradients.items():
        theirs = way()
        check(name, theirs[0], out)
        check(name, theirs[1], gradient)
        del theirs
    lines += [f"\n### Decode and its gradient in the activations, {few:,} of these tokens\n"]
    times = alternate(gradients, args.rounds)
    verdicts = {}
    if "sparsify" in times:
        slower = ratio(times, "qwen-scope, by_feature()", "sparsify")
        verdicts["sparsify"] = at_most(slower, 1.0).replace("ours", "by_feature()")
    lines += table(times, "qwen-scope", verdicts)
    write("encode_decode.py", lines, args.out)


if __name__ == "__main__":
    main()
