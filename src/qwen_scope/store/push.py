"""A store on the Hub."""

from __future__ import annotations

from pathlib import Path

from qwen_scope.errors import InputError
from qwen_scope.files import Remote, card_table, card_text, push_folder

from .layout import Manifest


def push_store(folder: Path | Remote, held: Manifest, repo: str, private: bool) -> str:
    """See `FeatureStore.push_to_hub`."""
    if not isinstance(folder, Path):
        raise InputError(f"{folder} is not on this disk; download the store first")
    table = card_table(
        ("layer", "SAEs", "features", "tokens that count", "activations"),
        [(layer, info.group, info.d_sae, info.tokens, info.activations) for layer, info in sorted(held.layers.items())],
    )
    parts = [
        f"Activations of SAE features over {held.documents:,} documents with {held.tokens:,} tokens, read by"
        f" `{held.model}`: Parquet files with a manifest.",
        table,
        f"```sh\nhf download {repo} --repo-type dataset --local-dir store\nqwen-scope store store\n```",
    ]
    card = card_text("A feature store", ["interpretability", "sparse-autoencoder"], parts)
    return push_folder(folder, repo, "dataset", "A feature store by qwen-scope", private=private, card=card)
