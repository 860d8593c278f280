"""Extraction beside what the neighbours do on the same model, tokens and layer.

    python bench/extract_peers.py [--blocks 8] [--layer 3] [--rows 16] [--rounds 3]

A model of the width of Qwen3-1.7B with random weights in bf16, rows of 256 tokens of the lab's text, 32,768 features.
Ours reads text and writes an indexed store. sae_lens: its own wrapper of a Hugging Face model caches the activations on
disk, then its SAE encodes them. delphi's way, written out: a hook on the whole forward pass, dense features, locations
and activations above 1e-5 kept in memory and saved in five splits at the end. Their features of every token are
compared with the store before anything is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from side_by_side import PAGE, Way, alternate, at_least, ratio, table, tensors, write

import numpy as np  # isort: skip
import torch  # isort: skip
from extract import D_SAE, K, SHAPE, model_of  # isort: skip
from safetensors.numpy import save_file  # isort: skip

from qwen_scope import FeatureStore, load_scope  # isort: skip
from qwen_scope.scope import ExtractOptions, extract  # isort: skip
from qwen_scope.text import Corpus

from qwen_scope.lab import documents  # isort: skip
from qwen_scope.model import LoadedModel  # isort: skip
from qwen_scope.sae import Identity, TopK, fingerprint  # isort: skip

CONTEXT, PER_BATCH, SPLITS, SMALLEST, GOAL, SAME = 256, 16, 5, 1e-5, 2.0, 0.98


def rows_of(tokenizer, rows: int) -> tuple[list[str], torch.Tensor]:
    """Texts of exactly one row each, and their tokens."""
    texts, ids, held = [], [], ""
    for document in documents(seed=3, n=None):
        held += document.text + "\n"
        some = tokenizer(held, verbose=False)["input_ids"]
        if len(some) < CONTEXT:
            continue
        text, held = tokenizer.decode(some[:CONTEXT]), ""
        again = tokenizer(text, verbose=False)["input_ids"]
        if len(again) == CONTEXT:
            texts.append(text)
            ids.append(again)
        if len(texts) == rows:
            break
    return texts, torch.tensor(ids)


def sae_lens_way(folder: Path, ids: torch.Tensor, weights: tuple, layer: int) -> Way:
    """Activations to disk with its wrapper of the model, then its SAE over them."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.load_model import load_model

    hook = f"model.layers.{layer}"
    model = load_model("AutoModelForCausalLM", str(folder), "cpu", {"dtype": torch.bfloat16}, [hook])
    W_enc, W_dec, b_enc, b_dec = weights
    sae = TopKSAE(TopKSAEConfig(d_in=len(b_dec), d_sae=len(b_enc), k=K, apply_b_dec_to_input=False,
                                normalize_activations="none", rescale_acts_by_decoder_norm=False))  # fmt: skip
    with torch.no_grad():
        for name, value in {"W_enc": W_enc.T, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec}.items():
            getattr(sae, name).copy_(value)

    def way() -> list[torch.Tensor]:
        with tempfile.TemporaryDirectory() as kept:
            for i, batch in enumerate(ids.split(PER_BATCH)):
                cache = model.run_with_cache(batch, names_filter=[hook], prepend_bos=False)[1]
                np.save(f"{kept}/{i}.npy", cache[hook].float().numpy())
            found = []
            for i in range(len(ids.split(PER_BATCH))):
                acts = sae.encode(torch.from_numpy(np.load(f"{kept}/{i}.npy")))
                where = acts.nonzero()
                found.append(torch.cat([where.float(), acts[tuple(where.T)][:, None].float()], 1))
            return found

    return way


def delphi_way(model, ids: torch.Tensor, weights: tuple, layer: int) -> Way:
    """The whole forward pass with a hook, dense features, everything in memory until it is saved in splits."""
    W_enc, _, b_enc, _ = weights
    caught = []
    model.model.layers[layer].register_forward_hook(
        lambda _module, _inputs, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )

    def way() -> list[torch.Tensor]:
        locations, activations = [], []
        for i, batch in enumerate(ids.split(PER_BATCH)):
            caught.clear()
            model(batch)
            pre = torch.relu(caught[0].float() @ W_enc.T + b_enc)
            top = pre.topk(K, dim=-1)
            dense = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
            where = (dense.abs() > SMALLEST).nonzero()
            activations.append(dense[tuple(where.T)].half())
            where[:, 0] += i * PER_BATCH
            locations.append(where)
        where, values = torch.cat(locations), torch.cat(activations)
        with tempfile.TemporaryDirectory() as kept:
            for part in range(SPLITS):
                start, end = D_SAE * part // SPLITS, D_SAE * (part + 1) // SPLITS
                inside = (where[:, 2] >= start) & (where[:, 2] < end)
                data = {"locations": (where[inside] - torch.tensor([0, 0, start])).numpy().astype(np.uint32)}
                data |= {"activations": values[inside].numpy(), "tokens": ids.numpy()}
                save_file(data, f"{kept}/{start}_{end - 1}.safetensors")
        return [torch.cat([where.float(), values.float()[:, None]], 1)]

    return way


def same(store: FeatureStore, found: list[torch.Tensor]) -> float:
    """The share of a peer's activations that the store has at the same token and feature."""
    mine = store.sql("SELECT document, position, feature FROM activations")
    theirs, row = [], 0
    for part in found:
        some = part[:, :3].long()
        if len(found) > 1:
            some[:, 0] += row
            row = int(some[:, 0].max()) + 1
        theirs.append(some.numpy())
    keys = [
        (a.astype(np.int64) * CONTEXT + b) * D_SAE + c
        for a, b, c in (tuple(mine[name].to_numpy() for name in mine.column_names), np.concatenate(theirs).T)
    ]
    return len(np.intersect1d(*keys)) / len(keys[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = load_scope("lab", device="cpu").tokenizer
    model = model_of(args.blocks, len(tokenizer))
    texts, ids = rows_of(tokenizer, args.rows)
    _, W, b = tensors(SHAPE["hidden_size"], D_SAE, 1)
    weights = W, W.T, b, torch.zeros(SHAPE["hidden_size"])
    sae = TopK(*weights, k=K, identity=Identity("random", args.layer, fingerprint(*weights)))
    loaded = LoadedModel(model, tokenizer, "random")
    options = ExtractOptions(batch_tokens=CONTEXT * PER_BATCH)

    def ours(folder: Path) -> FeatureStore:
        return extract(Corpus(texts, name="bench"), loaded, {args.layer: sae}, folder, options)

    def timed() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ours(Path(folder) / "store").close()

    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(f"{work}/model")
        tokenizer.save_pretrained(f"{work}/model")
        ways: dict[str, Way] = {"qwen-scope extract": timed}
        ways["delphi's way"] = delphi_way(model, ids, weights, args.layer)
        try:
            ways["sae_lens: activations to disk, then encode"] = sae_lens_way(
                Path(work) / "model", ids, weights, args.layer
            )
        except ImportError as error:
            print(f"sae_lens is left out: {error}", flush=True)
        agreed = {}
        with ours(Path(work) / "store") as store:
            for name, way in ways.items():
                if name != "qwen-scope extract":
                    agreed[name] = same(store, way())
                    print(f"{name}: {agreed[name]:.2%} of its activations are in the store", flush=True)
                    if agreed[name] < SAME:
                        raise SystemExit(f"{name} finds other features; there is nothing to compare")
        times = alternate(ways, args.rounds)
    marks = {name: at_least(ratio(times, name, "qwen-scope extract"), GOAL) for name in agreed}
    shares = "; ".join(f"{name} {share:.2%}" for name, share in agreed.items())
    shape = f"layer {args.layer} of {args.blocks}, d_model 2,048, d_sae {D_SAE:,}, k {K}"
    title = f"{ids.numel():,} tokens in {len(ids)} rows, {shape}"
    lines = [
        f"\n### {title}\n",
        f"Share of a peer's activations that the store also has (bf16 model, same batches): {shares}.\n",
    ]
    write("extract_peers.py", [*lines, *table(times, "qwen-scope extract", marks)], args.out)


if __name__ == "__main__":
    main()
