"""Whether SAEs and a language model belong together, as far as their files say."""

from __future__ import annotations

import json
import logging
import re
import shlex
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qwen_scope.errors import MismatchError, QwenScopeWarning
from qwen_scope.model import HookPoint, LoadedModel, d_model, load_model, n_layers, norms_parts, weights_fingerprint
from qwen_scope.sae import SAE, catalog

from .saes import SAEs
from .verdicts import DO_NOT_USE, Verdict, recall, remembered

LOG = logging.getLogger(__name__)

# What TransformerLens and sae_lens call models that have another name on the Hub.
SHORT = {"gpt2-small": "gpt2", "gpt2-xl": "gpt2-xl"}
# Parts of a name that tell variants of one model apart: how it was tuned after pretraining ...
TUNED = frozenset({"base", "pt", "instruct", "it", "chat", "sft", "dpo", "rl", "thinking", "post", "trained"})
# ... and how its weights are stored.
STORED = re.compile(
    r"hf|gguf|ggml|mlx|awq|gptq|fp8|bf16|fp16|float16|float32|bnb|int[48]|[48]bit|q[2-8](_[a-z0-9_]+)?|dynamic|unsloth"
)
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


class Joined:
    """A language model and the source of SAEs that are used on it: every SAE passes here before it is used.

    Args:
        loaded: the model.
        source: where the SAEs are read from.
        variants: whether a variant of the SAEs' model (base or post-trained) is odd, too; it is not where two variants
            are what is compared.
        measured: whether the pair is being measured now: then neither names nor an earlier verdict are said.

    Attributes:
        notes: what is odd about the pair, each also given once as a `QwenScopeWarning`.
        verdicts: by layer what `qwen-scope eval --post` found of the SAEs that were met. A verdict is logged once for
            all layers that were measured together, and is a note and a warning if it is `do not use`.
    """

    def __init__(self, loaded: LoadedModel, source: str, *, variants: bool = True, measured: bool = False) -> None:
        self.model, self.name, self.source, self.variants = loaded.model, loaded.name, source, variants
        self.measured = measured
        self.notes: tuple[str, ...] = ()
        self.verdicts: dict[int, Verdict] = {}
        self._said: tuple[str, ...] = ()
        self._fingerprint: str | None = None
        self._lock = threading.RLock()

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that is known of the pair and the layers met so far, warnings first."""
        return (*self.notes, *self._said)

    def meet(self, layer: int, sae: SAE) -> SAE:
        """The SAE, if the model can be read by it at this layer; what is odd about the pair is said.

        Raises:
            MismatchError: another width, a layer the model does not have, or a stream it has two of.
        """
        width, depth = d_model(self.model), n_layers(self.model)
        if sae.d_model != width:
            raise MismatchError(
                f"the SAE {sae.identity.group} reads residuals of {sae.d_model} dimensions, the model's have {width}:"
                " they do not belong together"
            )
        point = HookPoint.read_by(sae.hook_point, layer)
        if point.layer >= depth:
            raise MismatchError(f"{sae.identity} reads {point}, but {self.name} has {depth} layers, counted from 0")
        check_stream(sae, self.model, point)
        if self.measured:
            return sae
        with self._lock:
            verdict = recall(sae.identity.fingerprint, self.fingerprint)
            if verdict is None:
                said = self.unverified(sae)
            else:
                self.verdicts[layer] = verdict
                said = self.told(verdict)
            if said is None or said in self.notes:
                return sae
            self.notes = (*self.notes, said)
        warnings.warn(said, QwenScopeWarning, stacklevel=2)
        return sae

    def fingerprint(self) -> str | None:
        """That of the model's weights, taken at the first call."""
        if self._fingerprint is None:
            self._fingerprint = weights_fingerprint(self.model)
        return self._fingerprint

    def told(self, verdict: Verdict) -> str | None:
        """The sentence of a verdict that is a warning; any other is logged here, once."""
        if verdict.verdict == DO_NOT_USE:
            return verdict.sentence
        if verdict.sentence not in self.sentences:
            self._said = (*self._said, verdict.sentence)
            LOG.info("%s", verdict.sentence)
        return None

    def unverified(self, sae: SAE) -> str | None:
        """What names and recorded fingerprints say against a pair that was not measured, and what would settle it."""
        named = model_named_by(sae, self.source)
        said = None if named is None else difference(named, self.name, variants=self.variants)
        trained_on = recorded_weights(sae) if self.variants else None
        if trained_on is not None and (own := self.fingerprint()) is not None:
            if own == trained_on:
                return None
            said = said or (
                f"the SAEs were trained on other weights than those of {names_of_model(self.name)[0]}, though the names"
                " agree: it was fine-tuned, quantised or otherwise changed, or the SAEs are of an earlier state of it"
            )
        if said is None or not self.variants:
            return said
        known = [] if named is None or named == self.name else ["--model", named]
        words = ["qwen-scope", "eval", "CORPUS", *known, "--sae", self.source, "--post", self.name]
        return f"{said}; to measure whether they fit: {shlex.join(words)}"


class ScopeVerdicts:
    """`verdicts[layer]`: what `qwen-scope eval --post` found of a layer's SAE on this model, or None."""

    def __init__(self, saes: SAEs, joined: Joined) -> None:
        self._saes, self._joined = saes, joined

    def __getitem__(self, layer: int) -> Verdict | None:
        """Raises NotFoundError where there is no SAE for this layer."""
        self._saes.hook_point(layer)
        return self._joined.verdicts.get(layer)


def tell_of(model: str, source: str, saes: Mapping[int, SAE]) -> None:
    """Say what is known of SAEs on a model that another process will run, as `Joined` says it.

    The model is opened, on the CPU, only where a verdict on one of the SAEs is remembered; else its name tells.

    Raises:
        QwenScopeError: as `load_model`.
    """
    if any(remembered(sae.identity.fingerprint) for sae in saes.values()):
        joined = Joined(load_model(model, device="cpu"), source)
        for layer, sae in saes.items():
            joined.meet(layer, sae)
        return
    named = {model_named_by(sae, source) for sae in saes.values()} - {None}
    for said in {difference(str(name), model) for name in named} - {None}:
        warnings.warn(str(said), QwenScopeWarning, stacklevel=2)


def recorded_weights(sae: SAE) -> str | None:
    """The fingerprint of the model that an SAE was trained on, as its files say."""
    record = sae.meta.get("base")
    found = record.get("weights") if isinstance(record, dict) else None
    return found if isinstance(found, str) and found else None


def saes_on(loaded: LoadedModel, source: str, *, device: torch.device | str = "cpu") -> SAEs:
    """The SAEs of a source for a model without a `Scope`, each compared with the model when it is opened.

    Raises:
        NotFoundError: the source does not exist or holds no SAE.
    """
    saes = SAEs(source, d_model=d_model(loaded.model), device=device)
    saes.tell(Joined(loaded, source).meet)
    return saes


def words(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """A model's name without its owner as two sets of words: which model, and which of its variants.

    Case, `_` against `-`, how weights are stored and dates of a release don't count.
    """
    last = name.strip().rstrip("/").replace("\\", "/").rpartition("/")[2].lower().removesuffix(".gguf")
    last = SHORT.get(last, last)
    parts = [part for part in re.split(r"[-_ ]+", last) if part and not STORED.fullmatch(part)]
    parts = [part for part in parts if not re.fullmatch(r"2[0-9]{3}", part)]
    return frozenset(p for p in parts if p not in TUNED), frozenset(p for p in parts if p in TUNED)


def names_of_model(source: str) -> list[str]:
    """The names of a model that was loaded from a Hub id or a folder, the most telling one first."""
    path = Path(source)
    if not path.is_dir():
        return [source]
    names = []
    if match := _SNAPSHOT.search(path.resolve().as_posix() + "/"):
        names.append(f"{match[1]}/{match[2]}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    said = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(said, str) and said:
        names.append(said)
    return [*names, str(path.resolve())]


def model_named_by(sae: SAE, source: str) -> str | None:
    """The model that the SAE's files name, or the catalog for a released group; None where neither does."""
    record = sae.meta.get("history")
    own = record.get(sae.hook_point) if isinstance(record, dict) else None
    for said in (sae.meta.get("model"), own.get("model") if isinstance(own, dict) else None):
        if isinstance(said, str) and said.strip():
            return said.strip()
    group = catalog.lookup(source)
    return None if group is None else group.model


def difference(trained_on: str, model: str, *, variants: bool = True) -> str | None:
    """One sentence where SAEs of one model are used on another, told apart by name alone; None for the same.

    Args:
        trained_on: the model that the SAEs' files name.
        model: the source of the language model: a Hub id or a folder.
        variants: whether another variant of the same model is a difference.
    """
    kin = kinship(trained_on, model)
    shown = names_of_model(model)[0]
    if kin == "variant" and variants:
        return (
            f"the SAEs were trained on {trained_on:.100}, and {shown} is another variant of that model (base or"
            " post-trained): most features carry over, figures measured on the one don't hold for the other"
        )
    if kin == "other":
        return (
            f"the SAEs were trained on another model: their files name {trained_on:.100}, and the model is {shown};"
            " unless that is the same model under another name, their features mean nothing here"
        )
    return None


def store_of_another(made_with: str, model: str) -> str | None:
    """One sentence where a store is read beside another model than it was made with; None for the same."""
    if kinship(made_with, model) == "same":
        return None
    return (
        f"the store was made with {made_with:.100}, and the model is {names_of_model(model)[0]}; unless that is the"
        " same model, what the one says of a feature doesn't hold for the other"
    )


def kinship(one: str, other: str) -> Literal["same", "variant", "other"]:
    """How two names or folders of models are related, as far as names tell."""
    bundled = [group for group in catalog.groups() if group.folder is not None]
    one, other = (next((g.model for g in bundled if name in g.aliases), name) for name in (one, other))
    if one == other or _same_folder(one, other):
        return "same"
    ours, theirs = ([words(name) for name in names_of_model(source)] for source in (one, other))
    if any(name in theirs for name in ours):
        return "same"
    return "variant" if {which for which, _ in ours} & {which for which, _ in theirs} else "other"


def check_stream(sae: SAE, model: nn.Module, point: HookPoint) -> None:
    """Refuse an SAE whose stream this model has two of, which tools call by one name.

    Raises:
        MismatchError: TransformerLens reads a part behind the norm that follows it, transformers' module before.
    """
    lens = sae.meta.get("sae_lens")
    if point.stream == "resid_post" or not isinstance(lens, dict) or not norms_parts(model, point.layer):
        return
    metadata = lens.get("metadata")
    said = {**lens, **(metadata if isinstance(metadata, dict) else {})}.get("hook_name")
    if isinstance(said, str) and "hook_" in said:
        raise MismatchError(
            f"{sae.identity} reads {said}, which is behind a norm in {type(model).__name__}; this project reads"
            f" {point} before that norm"
        )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()
