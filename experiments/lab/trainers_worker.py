"""Train one SAE with one trainer, in the trainer's own environment; started by trainers.py and real/saes.py.

Reads `residuals.safetensors`, or numbers in bfloat16 that `--residuals` names, and writes `weights.safetensors`,
weights that read the raw residual. It imports nothing of the experiments, since a peer's environment holds the peer
alone.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DECAY = 0.5  # our share of the run in which the learning rate falls
BETAS = (0.5, 0.95)  # our rates of Adam


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("trainer", choices=tuple(TRAINERS))
    ask.add_argument("folder", type=Path)
    ask.add_argument("--setting", choices=("defaults", "ours"), required=True)
    ask.add_argument("--lr", type=float, required=True)
    for name in ("tokens", "batch", "d-sae", "k"):
        ask.add_argument(f"--{name}", type=int, required=True)
    ask.add_argument("--residuals", type=Path, help="a file of bfloat16 numbers, (tokens, d-model)")
    ask.add_argument("--d-model", type=int)
    args = ask.parse_args()
    if args.residuals:
        size = args.tokens * args.d_model
        x = torch.from_file(str(args.residuals), size=size, dtype=torch.bfloat16).view(args.tokens, args.d_model)
    else:
        x = load_file(args.folder / "residuals.safetensors")["train"]
    torch.manual_seed(0)
    weights = TRAINERS[args.trainer](x, args)
    save_file(
        {name: w.detach().float().contiguous() for name, w in weights.items()}, args.folder / "weights.safetensors"
    )


def batches(x: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Whole batches in float32, each from all over the tokens, so that none is of one text: one is in memory."""
    steps = args.tokens // args.batch
    for step in range(steps):
        yield x[step::steps][: args.batch].float()


def with_ours(x: torch.Tensor, args: argparse.Namespace, architecture: str = "topk") -> dict[str, torch.Tensor]:
    from qwen_scope.train import Checkpoints, TrainConfig, train

    config = TrainConfig(
        d_sae=args.d_sae, k=args.k, tokens=args.tokens, batch=args.batch, lr=args.lr, architecture=architecture
    )
    saved = Checkpoints(args.folder / "checkpoints", resume=True, keep=1) if args.residuals else None
    sae = train(config, ({"layers.0": part} for part in batches(x, args)), checkpoints=saved)["layers.0"]
    return {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", *sae.own)}


def with_batchtopk(x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    return with_ours(x, args, "batchtopk")


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
            "lr_decay_steps": int(DECAY * steps), "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
            "dead_feature_window": steps // 10, "n_batches_for_norm_estimate": 10,
        }  # fmt: skip
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=args.d_sae, k=args.k, **sae_options))
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=steps * args.batch, train_batch_size_samples=args.batch, **options),
        sae,
        again(x, args),
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


def again(x: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The batches, from the start again at their end: sae_lens takes some first to estimate the norm."""
    while True:
        yield from batches(x, args)


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
    factor = float(x[: 100 * args.batch].float().square().sum(1).mean().sqrt())
    for step, part in enumerate(batches(x, args)):
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
            return self.body(x[input_ids].float())

    row = 64
    steps = args.tokens // args.batch
    ids = torch.arange(steps * args.batch).view(args.batch, steps).T.reshape(-1, row)  # the order of `batches`
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


TRAINERS = {
    "qwen-scope": with_ours,
    "qwen-scope-batchtopk": with_batchtopk,
    "sae_lens": with_sae_lens,
    "sparsify": with_sparsify,
    "dictionary_learning": with_dictionary_learning,
}

if __name__ == "__main__":
    main()
