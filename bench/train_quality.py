"""Our trainer against sae_lens, sparsify and dictionary_learning: same residuals, width, k, batch, tokens and order.

Each peer trains in an environment of its own (`.venv-<peer>`, made by `tests/peers/run.sh <peer>`), once with its own
defaults and once with our learning rate, warm-up, decay, AuxK weight and dead window, as far as it has them. All are
measured by the same few lines below, in float64, on held-out residuals.

Run: python bench/train_quality.py [--layer 3] [--tokens 1200000] [--batch 2048] [--d-sae 2048] [--k 32] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
PEERS = ("sae_lens", "sparsify", "dictionary_learning")
HELD_OUT = 65536
DECAY = 0.2  # our share of the run in which the learning rate falls


def main() -> None:
    args = arguments()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_residuals(Path(folder), args)
        rows = [one(Path(folder), args, "qwen-scope", "defaults")]
        rows += [one(Path(folder), args, peer, setting) for peer in PEERS for setting in ("defaults", "ours")]
    shape = f"{args.tokens:,} tokens, d_sae {args.d_sae}, k {args.k}, batch {args.batch}"
    title = f"layer {args.layer} of {args.model}: {shape}"
    lines = [
        title,
        "",
        "| trainer | settings | FVU | L0 | never fired | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        said = row.get("error") or "{fvu:.4f} | {l0:.1f} | {dead:.2%} | {seconds:.0f}".format(**row)
        lines.append(f"| {row['trainer']} | {row['setting']} | {said} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "src/qwen_scope/assets/lab/model"))
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=("qwen-scope", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="defaults", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_residuals(folder: Path, args: argparse.Namespace) -> None:
    """Shuffled residuals of the lab's text, the held-out ones from documents that training never sees."""
    from qwen_scope.model import HookPoint, capture, load_model
    from qwen_scope.text import Corpus, TokenRows

    loaded, point = load_model(args.model, device="cpu"), HookPoint(args.layer)
    found = {}
    for name, wanted, held_out in (("train", args.tokens, False), ("held", HELD_OUT, True)):
        documents = Corpus("lab", hold_out=20, held_out=held_out)
        parts, have = [], 0
        for ids in TokenRows(documents, loaded.tokenizer, context_length=256, batch_size=16):
            parts.append(capture(loaded.model, ids, [point])[point].flatten(0, 1))
            have += len(parts[-1])
            if have >= wanted:
                break
        x = torch.cat(parts)
        found[name] = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))][:wanted].clone()
    save_file(found, folder / "residuals.safetensors")


def one(folder: Path, args: argparse.Namespace, trainer: str, setting: str) -> dict:
    """Train with one trainer in its own environment, and measure what it made."""
    from qwen_scope.train import TrainConfig

    python = sys.executable if trainer == "qwen-scope" else str(ROOT / f".venv-{trainer}/bin/python")
    row = {"trainer": trainer, "setting": setting}
    if not Path(python).exists():
        return {**row, "error": f"no {python}; run tests/peers/run.sh {trainer}"}
    ours = TrainConfig(d_sae=args.d_sae, k=args.k, tokens=args.tokens, batch=args.batch)
    command = [
        python,
        __file__,
        "--worker",
        trainer,
        "--setting",
        setting,
        "--folder",
        str(folder),
        "--lr",
        str(ours.peak_lr),
    ]
    for name in ("tokens", "batch", "d_sae", "k"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    quiet = {
        "SPARSIFY_DISABLE_TRITON": "1",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    began = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-1]}
    held = load_file(folder / "residuals.safetensors")["held"].double()
    return {
        **row,
        "seconds": time.monotonic() - began,
        **quality(load_file(folder / "weights.safetensors"), held, args.k),
    }


def quality(weights: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> dict[str, float]:
    """`FVU = sum |x - x_hat|^2 / sum |x - mean|^2`, L0, and the share of features that fire on no held-out token."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    error, fired, active = 0.0, torch.zeros(len(w["b_enc"]), dtype=torch.bool), 0
    for part in x.split(4096):
        pre = (part @ w["W_enc"].T + w["b_enc"]).relu()
        top = pre.topk(k, dim=-1)
        acts = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
        error += float((part - acts @ w["W_dec"].T - w["b_dec"]).square().sum())
        fired |= (acts > 0).any(0)
        active += int((acts > 0).sum())
    total = float((x - x.mean(0)).square().sum())
    return {"fvu": error / total, "l0": active / len(x), "dead": float((~fired).double().mean())}


def work(args: argparse.Namespace) -> None:
    """In the trainer's own environment: train, and write weights that read the raw residual."""
    x = load_file(args.folder / "residuals.safetensors")["train"]
    trainers = {
        "qwen-scope": with_ours, "sae_lens": with_sae_lens, "sparsify": with_sparsify,
        "dictionary_learning": with_dictionary_learning,
    }  # fmt: skip
    torch.manual_seed(0)
    weights = trainers[args.worker](x, args)
    save_file(
        {name: w.detach().float().contiguous() for name, w in weights.items()}, args.folder / "weights.safetensors"
    )


def with_ours(x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    from qwen_scope.train import TrainConfig, train

    config = TrainConfig(d_sae=args.d_sae, k=args.k, tokens=args.tokens, batch=args.batch)
    sae = train(config, ({"layers.0": part} for part in x.split(args.batch)))["layers.0"]
    return {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def with_sae_lens(x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = args.tokens // args.batch
    sae_options, options = {}, {"lr_end": 3e-5}  # what its runner's config makes of its default lr
    if args.setting == "ours":
        sae_options = {"aux_loss_coefficient": 1 / 32, "normalize_activations": "expected_average_only_in"}
        options = {
            "lr": args.lr, "lr_end": args.lr / 10, "lr_warm_up_steps": steps // 20,
            "lr_decay_steps": int(DECAY * steps), "dead_feature_window": steps // 10, "n_batches_for_norm_estimate": 10,
        }  # fmt: skip
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=args.d_sae, k=args.k, **sae_options))
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=steps * args.batch, train_batch_size_samples=args.batch, **options),
        sae,
        itertools.cycle(x.split(args.batch)[:steps]),
    )
    trained = trainer.fit()
    w = {name: getattr(trained, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    W_enc, b_enc, W_dec = w["W_enc"].T, w["b_enc"], w["W_dec"].T
    if trained.cfg.rescale_acts_by_decoder_norm:
        # It ranks by pre-activation times decoder norm; with unit decoder columns that is a plain TopK.
        norms = W_dec.norm(dim=0)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms
    if trained.cfg.apply_b_dec_to_input:
        b_enc = b_enc - W_enc @ w["b_dec"]
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": w["b_dec"]}


def with_dictionary_learning(x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    # What its package imports for collecting activations and reading text, which nothing here does.
    for name, member in {
        "nnsight": "LanguageModel",
        "datasets": "load_dataset",
        "zstandard": "ZstdDecompressor",
    }.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], member, object)
    from dictionary_learning.trainers.top_k import TopKTrainer

    steps = args.tokens // args.batch
    options = {"warmup_steps": min(1000, steps // 2)}
    if args.setting == "ours":
        options = {"lr": args.lr, "warmup_steps": steps // 20, "decay_start": int((1 - DECAY) * steps)}
    trainer = TopKTrainer(
        steps=steps, activation_dim=x.shape[1], dict_size=args.d_sae, k=args.k, layer=0, lm_name="lab", device="cpu",
        seed=0, **options,
    )  # fmt: skip
    if args.setting == "ours":
        trainer.dead_feature_threshold = args.tokens // 10
    # As its `trainSAE(normalize_activations=True)`, which its examples use: unit mean squared norm, folded at the end.
    factor = float(x[: 100 * args.batch].square().sum(1).mean().sqrt())
    for step, part in enumerate(x.split(args.batch)[:steps]):
        trainer.update(step, part / factor)
    trainer.ae.scale_biases(factor)
    ae = trainer.ae
    b_enc = ae.encoder.bias - ae.encoder.weight @ ae.b_dec
    return {"W_enc": ae.encoder.weight, "W_dec": ae.decoder.weight, "b_enc": b_enc, "b_dec": ae.b_dec}


def with_sparsify(x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Its own Trainer, on a model whose only work is to look residuals up in a table."""
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from transformers import PretrainedConfig, PreTrainedModel

    class Table(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.anchor, self.body = torch.nn.Parameter(torch.zeros(1)), torch.nn.Identity()

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return self.body(x[input_ids])

    row = 64
    steps = args.tokens // args.batch
    ids = torch.arange(steps * args.batch).view(-1, row)
    options = {}
    if args.setting == "ours":
        options = {
            "optimizer": "adam", "lr": args.lr, "lr_warmup_steps": steps // 20, "auxk_alpha": 1 / 32,
            "dead_feature_threshold": args.tokens // 10,
        }  # fmt: skip
    config = TrainConfig(
        SaeConfig(num_latents=args.d_sae, k=args.k), batch_size=args.batch // row, hookpoints=["body"],
        save_every=10**9, log_to_wandb=False, save_dir=str(args.folder / "sparsify"), run_name=args.setting, **options,
    )  # fmt: skip
    trainer = Trainer(config, Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"), Table())
    trainer.fit()
    w = load_file(args.folder / "sparsify" / args.setting / "body" / "sae.safetensors")
    b_enc = w["encoder.bias"] - w["encoder.weight"] @ w["b_dec"]
    return {"W_enc": w["encoder.weight"], "W_dec": w["W_dec"].T, "b_enc": b_enc, "b_dec": w["b_dec"]}


if __name__ == "__main__":
    main()
