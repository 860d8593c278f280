"""SAEs that training begins with: what they are, what is kept of them, and how far their features went.

Feature 17 of the finished SAE is feature 17 of the one it began as. The record of where an SAE comes from stands in its
`meta` and files under `history`: per hook point the model and number of tokens it was trained on, and what it began as,
which may itself have begun as another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_scope.errors import MismatchError
from qwen_scope.files import Fields, write_text
from qwen_scope.model import HookPoint, LoadedModel, d_model
from qwen_scope.sae import SAE, catalog, load_sae
from qwen_scope.scope import Joined

from .config import TrainConfig
from .evaluate import Quality
from .options import TrainRun

KEY = "history"
"""Where the record is in an SAE's `meta` and files."""

ANCESTOR = ("group", "layer", "fingerprint", "model", "tokens")
LAB = "lab"
MOST = 10  # features that moved most, in the card
BLOCK = 4096  # features compared at a time


@dataclass(frozen=True)
class Moved:
    """How far the decoder directions of an SAE are from those it began with: cosines, by feature.

    Attributes:
        median, low, least: the median, the 5% quantile and the smallest cosine.
        below_90, below_50: shares of features whose cosine is below 0.9 and 0.5; the latter are other features now.
        most: the features that moved most, with their cosines.
    """

    median: float
    low: float
    least: float
    below_90: float
    below_50: float
    most: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, cosines: torch.Tensor) -> Moved:
        """What `cosines (d_sae,)` say."""
        values, features = cosines.cpu().sort()
        median, low = (float(values.quantile(q)) for q in (0.5, 0.05))
        below_90, below_50 = (float((values < limit).double().mean()) for limit in (0.9, 0.5))
        most = tuple(zip(features[:MOST].tolist(), values[:MOST].tolist(), strict=True))
        return cls(median, low, float(values[0]), below_90, below_50, most)


@dataclass(frozen=True)
class Began:
    """What one SAE began as, and what became of it.

    Attributes:
        history: what it began as, and before that, the earliest first: group, layer, fingerprint, and where they are
            known the model and the tokens that each was trained on.
        k: active features per token of what it began as; None where that varies.
        moved: its decoder against that one's, feature by feature.
        before: the quality of what it began as, on the tokens that this run measures on.
        scratch: the quality of an SAE that was trained from scratch on the same batches.
    """

    history: tuple[Mapping[str, Any], ...]
    k: int | None
    moved: Moved
    before: Quality | None = None
    scratch: Quality | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        measured = {"before": self.before, "scratch": self.scratch}
        found = {name: quality.plain() for name, quality in measured.items() if quality is not None}
        return {"history": [*map(dict, self.history)], "k": self.k, "moved": asdict(self.moved), **found}


def beginnings(run: TrainRun, loaded: LoadedModel, points: Sequence[HookPoint]) -> dict[str, SAE]:
    """The SAEs to go on from, by hook point; none where training begins anew.

    Raises:
        NotFoundError, MismatchError: a layer without one, or SAEs of another size, kind or model's shape.
    """
    if not run.start_from:
        return {}
    joined = Joined(loaded, run.start_from, variants=False)
    found = {str(p): joined.meet(p.layer, load_sae(run.start_from, p.layer)) for p in points}
    for sae in found.values():
        check_beginning(run.train, sae, d_model(loaded.model))
    return found


def check_beginning(config: TrainConfig, sae: SAE, width: int) -> None:
    """Raise MismatchError unless a run can go on from this SAE on residuals of `width` dimensions."""
    if sae.d_sae != config.d_sae or sae.d_model != width:
        hint = f"; features keep their numbers, so pass d_sae {sae.d_sae}" if sae.d_model == width else ""
        raise MismatchError(
            f"{sae.identity} has {sae.d_sae} features of {sae.d_model} dimensions; this run trains"
            f" {config.d_sae} features on residuals of {width} dimensions{hint}"
        )
    config.kind.accept(sae)


def history_of(sae: SAE, hook_point: str, source: str = "") -> list[dict[str, Any]]:
    """What an SAE began as, earliest first, and itself last, as its files and the catalog say.

    Raises:
        FormatError: its files hold a record that is none.
    """
    mine = {"group": sae.identity.group, "layer": sae.identity.layer, "fingerprint": sae.identity.fingerprint}
    known = sae.meta.get(KEY, {})
    what = f"{KEY!r} in the files of {sae.identity}"
    if not isinstance(known, Mapping) or hook_point not in known:
        return [{**mine, "model": sae.meta.get("model") or released_for(source), "tokens": None}]
    own = Fields(known[hook_point], what, ("model", "tokens", "began_as"))
    before = [ancestor(Fields(one, what, ANCESTOR)) for one in own.items("began_as")]
    return [*before, {**mine, "model": own.maybe(own.text, "model"), "tokens": own.maybe(own.count, "tokens")}]


def released_for(source: str) -> str | None:
    """The model of a group that the catalog knows; of the lab not where it lies."""
    group = catalog.lookup(source)
    return None if group is None else group.model if group.folder is None else LAB


def ancestor(one: Fields) -> dict[str, Any]:
    """One SAE of a record."""
    said = {"group": one.text("group"), "layer": one.maybe(one.count, "layer"), "fingerprint": one.text("fingerprint")}
    return {**said, "model": one.maybe(one.text, "model"), "tokens": one.maybe(one.count, "tokens")}


def with_history(sae: SAE, hook_point: str, model: str, history: Sequence[Mapping[str, Any]] = ()) -> SAE:
    """The SAE with the record of what it began as and was trained on."""
    own = {"model": model, "tokens": sae.meta["tokens"], "began_as": [*map(dict, history)]}
    made: Any = sae
    return replace(made, meta={**sae.meta, KEY: {hook_point: own}})


def cosines_of(now: SAE, before: SAE) -> torch.Tensor:
    """The cosine of each feature's decoder direction with that of the same number before, `(d_sae,)`."""
    parts = []
    for start in range(0, now.d_sae, BLOCK):
        pair = (sae.W_dec[:, start : start + BLOCK].cpu().float() for sae in (now, before))
        parts.append(torch.cosine_similarity(*pair, dim=0))
    return torch.cat(parts)


def write_cosines(folder: Path, hook_point: str, cosines: torch.Tensor) -> None:
    """Write `moved/layers.3.resid_post.csv` into a group: a line for each feature with its cosine."""
    (folder / "moved").mkdir(parents=True, exist_ok=True)
    lines = [f"{feature},{cosine:.6f}\n" for feature, cosine in enumerate(cosines.tolist())]
    write_text(folder / "moved" / f"{hook_point}.csv", "feature,cosine\n" + "".join(lines))


def check_same_beginning(earlier: Any, now: Mapping[str, Any], where: Path) -> None:
    """Raise MismatchError where a run that goes on began with other SAEs than those named now."""
    if earlier != now:
        before = ", ".join(sorted({str(one.get("group")) for one in (earlier or {}).values()})) or "new weights"
        here = ", ".join(sorted({one["group"] for one in now.values()})) or "new weights"
        raise MismatchError(f"{where} is a run that began with {before}; resumed with {here} it would be another")
