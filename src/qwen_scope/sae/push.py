"""SAEs on the Hub, with a card that says what they are and how they are read."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.files import card_table, card_text, push_folder, temporary_folder

from . import catalog
from .base import SAE
from .save import save_sae
from .terms import terms_of


def push_saes(saes: SAE | Sequence[SAE], repo: str, *, layout: str = "official", private: bool = False) -> str:
    """Send one SAE, or several layers of one group, to a repository of the Hub; the commit's address.

    `load_sae(repo, layer)` reads them from there. A card says what they are, and what the owner of released weights
    asks of those who use them.

    Args:
        repo: `owner/name`; made where there is none.
        layout: one of `LAYOUTS`, as for `save_sae`.

    Raises:
        InputError: no right to write there, or no token.   MismatchError: SAEs of several groups.
    """
    several = [saes] if isinstance(saes, SAE) else list(saes)
    with temporary_folder() as folder:
        save_sae(several, folder / "sae", layout)
        return push_folder(
            folder / "sae", repo, "model", "SAEs by qwen-scope", private=private, card=card_of(several, repo)
        )


def card_of(saes: Sequence[SAE], repo: str) -> str:
    """The card of SAEs of one group, sorted by layer."""
    group = saes[0].identity.group
    listed = catalog.lookup(group)
    said = saes[0].meta.get("model")
    model = listed.model if listed is not None and listed.folder is None else said if isinstance(said, str) else None
    table = card_table(
        ("layer", "reads", "kind", "features", "active", "d_model", "fingerprint"),
        [
            (one.identity.layer, one.hook_point, one.architecture, one.d_sae, one.k, one.d_model,
             f"`{one.identity.fingerprint[:12]}`")
            for one in sorted(saes, key=lambda sae: sae.identity.layer or 0)
        ],
    )  # fmt: skip
    first = saes[0].identity.layer
    call = f"```python\nfrom qwen_scope import load_sae\n\nsae = load_sae({repo!r}, layer={first})\n```"
    parts = [f"Sparse autoencoders of the group `{group}`.", table, call]
    if model is not None:
        parts.insert(1, f"Trained on residuals of `{model}`.")
    if (terms := terms_of(group)) is not None:
        parts.append(f"Terms of use: {terms}.")
    return card_text(group, ["sparse-autoencoder", "interpretability"], parts, model)
