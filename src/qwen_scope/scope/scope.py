"""`Scope` and how one is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.files import temporary_folder
from qwen_scope.model import (
    HookPoint,
    LoadedModel,
    capture,
    context_length,
    d_model,
    model_sizes,
    n_layers,
)
from qwen_scope.report import Progress, Table
from qwen_scope.sae import FeatureActs, terms_of
from qwen_scope.steer import Decoding, Generation, Intervention, Target, generate
from qwen_scope.store import FeatureStore, Firings
from qwen_scope.text import Chat, Corpus, CorpusOptions, Counted, Tokens, tally, tokenize

from .compare import Comparisons, compare_seen
from .engine import Engine, ModelEngine
from .extract import ExtractOptions, extract, telling
from .given import Layers, Texts, as_layers, as_texts, is_one
from .hooked import HookedFeatures, hooked
from .job import Runner
from .joined import Joined, ScopeVerdicts
from .measured import ScopeCounted, ScopeStats
from .plan import Plan, plan
from .saes import SAEs, brief
from .seen import TokenFeatures, spread, spread_flags

# Tokens (padding included) of one forward pass; texts of like length share one.
BATCH_TOKENS = 4096


class Scope:
    """One language model and its SAEs.

    Attributes:
        loaded: model, tokenizer and name as they were loaded.
        model, tokenizer: as transformers gives them.
        name: the model's source.
        saes: `saes[layer]`, read on first use and evicted by bytes.
        counted: `counted[layer]`, which tokens count: as the SAE's files say, else measured on first use.
        stats: `stats[layer]`, typical residual norm and feature maxima, measured on first use.
        joined: the pair of model and SAEs; every SAE passes it when it is opened, and what is odd is then said once.
        verdicts: `verdicts[layer]`, what `qwen-scope eval --post` found of this SAE on this model, or None.
    """

    def __init__(self, loaded: LoadedModel, saes: SAEs, counted: Counted | None = None) -> None:
        self.loaded, self.saes = loaded, saes
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.counted = ScopeCounted(loaded, saes, counted)
        self.stats = ScopeStats(saes, self.counted)
        self.d_model, self.n_layers = d_model(self.model), n_layers(self.model)
        if saes.d_model != self.d_model:
            raise MismatchError(f"the SAEs are for {saes.d_model} dimensions, {self.name} has {self.d_model}")
        if beyond := [layer for layer in saes.layers if layer >= self.n_layers]:
            raise MismatchError(
                f"{saes.source} has SAEs for layers {brief(beyond)}, {self.name} has {self.n_layers} layers"
            )
        self.joined = Joined(loaded, saes.source)
        self.verdicts = ScopeVerdicts(saes, self.joined)
        saes.tell(self.joined.meet)

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, SAEs {self.saes.source!r} of layers {brief(self.layers)})"

    def _repr_html_(self) -> str:
        one = self.saes[self.layers[0]]
        facts = [
            ("model", f"{self.name}, {self.n_layers} layers of {self.d_model} dimensions, {self.model.dtype}"),
            ("SAEs", f"{self.saes.source}, layers {brief(self.layers)}"),
            ("features", f"{one.d_sae:,} per layer, {one.k} active"),
            *(("note", note) for note in self.notes),
            *([("terms", terms)] if (terms := terms_of(one.identity.group)) else []),
        ]
        return Table("Scope", ("", ""), facts)._repr_html_()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the pair of model and SAEs, such as SAEs that name another model."""
        return self.joined.notes

    @property
    def layers(self) -> list[int]:
        """The layers that have an SAE."""
        return self.saes.layers

    def hook_point(self, layer: int) -> HookPoint:
        """Where the SAE of a layer reads: `resid_post` of that layer, or `mlp_out` or `attn_out`.

        Raises:
            NotFoundError: there is no SAE for this layer.
        """
        return self.saes.hook_point(layer)

    @property
    def plan(self) -> Plan:
        """What this scope takes in memory."""
        one = self.saes[self.layers[0]]
        return plan(
            model_sizes(self.model.config),
            one.d_sae,
            len(self.layers),
            dtype=str(self.model.dtype).removeprefix("torch."),
            sae_dtype=str(one.dtype).removeprefix("torch."),
            on_gpu=one.device.type != "cpu",
        )

    def tokenize(self, texts: Texts, *, chat: Chat | None = None, truncate: bool = False) -> Tokens:
        """Texts, or conversations with `chat`, to tokens within the model's context. No BOS is invented.

        Raises:
            InputError: an empty text, or one longer than the context unless `truncate`.
        """
        return tokenize(
            self.tokenizer, as_texts(texts), max_length=context_length(self.model), truncate=truncate, chat=chat
        )

    def capture(self, tokens: Tokens, layers: Layers = None) -> dict[int, Float[Tensor, "batch seq d_model"]]:
        """What the SAEs of the given layers read, from one forward pass; rows at padding hold no meaning."""
        points = [self.hook_point(layer) for layer in self.check_layers(layers)]
        found = capture(self.model, tokens.input_ids, points, tokens.attention_mask)
        return {point.layer: h for point, h in found.items()}

    def features(
        self,
        texts: Texts,
        layers: Layers = None,
        *,
        chat: Chat | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        counted: Counted | None = None,
    ) -> TokenFeatures:
        """The features of every token of every text, and which tokens count.

        Args:
            texts: one or more, each a string or, with `chat`, a conversation (a list of messages); in a list, an array
                or a Series.
            layers: which layers, such as 3, [0, 2] or "0,2-5"; by default all that have an SAE.
            chat: render each with the tokenizer's chat template, in this mode; a string becomes a user's message.
            truncate: cut a text longer than the context instead of refusing it.
            batch_tokens: tokens per forward pass, padding included; a longer text is read in pieces, which moves last
                digits.
            counted: which tokens count at every layer, such as a rule's; by default as `scope.counted[layer]` says.

        Raises:
            InputError: no text, an empty text, or one longer than the context.
            NotFoundError: a layer without an SAE.
        """
        wanted = self.check_layers(layers)
        tokens = self.tokenize(texts, chat=chat, truncate=truncate)
        mask = tokens.attention_mask.bool()
        parts: dict[int, list[FeatureActs]] = {layer: [] for layer in wanted}
        sinks: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
        points = [self.hook_point(layer) for layer in wanted]
        which = {layer: counted or self.counted[layer] for layer in wanted}
        ids = [row[here].tolist() for row, here in zip(tokens.input_ids, mask, strict=True)]
        order: dict[int, None] = {}
        for rows, residuals in ModelEngine(self.model, batch_tokens).activations(ids, points):
            order |= dict.fromkeys(rows)
            for point, h in residuals.items():
                parts[point.layer].append(self.saes[point.layer].encode(h).to("cpu"))
                sinks[point.layer].append(which[point.layer].sinks(h, point).cpu())
        acts = {layer: spread(FeatureActs.cat(found), mask, list(order)) for layer, found in parts.items()}
        reasons = {
            layer: which[layer].reasons_of(tokens, spread_flags(torch.cat(found), mask, list(order)))
            for layer, found in sinks.items()
        }
        if counted is None:
            self.counted.check_share({layer: tally(found) for layer, found in reasons.items()})
        return TokenFeatures(tokens.texts, tokens.strings, tokens.input_ids, mask, acts, tokens, reasons)

    def compare(
        self,
        a: Texts,
        b: Texts,
        layers: Layers = None,
        *,
        n: int | None = 5,
        drop_first: bool = False,
        drop_common: bool = False,
        drop_prefix: bool = False,
        phases: Collection[str] | None = None,
        chat: Chat | None = None,
    ) -> Comparisons:
        """Per layer, the `n` features whose activation rates differ most between two texts, or two sets of texts.

        Rates are over the tokens that count. The options leave out, besides, the first token of each text, tokens whose
        id occurs on both sides, the beginning that all texts share, or tokens of other phases of a conversation than
        those named.

        Raises:
            InputError: an empty text, or nothing left to compare.
            NotFoundError: a layer without an SAE.
        """
        one, other = as_texts(a), as_texts(b)
        seen = self.features([*one, *other], layers, chat=chat)
        return compare_seen(
            seen,
            len(one),
            n=n,
            drop_first=drop_first,
            drop_common=drop_common,
            drop_prefix=drop_prefix,
            phases=phases,
        )

    def extract(
        self,
        source: Any,
        folder: str | os.PathLike[str],
        options: ExtractOptions | None = None,
        *,
        layers: Layers = None,
        reading: CorpusOptions | None = None,
        engine: Engine | None = None,
        runner: Runner | None = None,
        progress: Progress | None = None,
    ) -> FeatureStore:
        """Write which features fire on every token of a corpus into a store, and open it; see `extract`.

        SAEs are read from their memory-mapped files, and each comes to the scope's device for its turn.

        Args:
            source: a `Corpus`, or whatever `Corpus.of` opens with `reading`.
            layers: by default all that have an SAE.   engine: by default forward passes of the model.
            runner: where windows are read and encoded; by default here.

        Raises:
            InputError, MismatchError, NotFoundError: as `extract` and `Corpus.of`.
        """
        corpus = source if isinstance(source, Corpus) else Corpus.of(source, reading or CorpusOptions())
        if options is None and reading is not None:
            options = ExtractOptions(chat=reading.chat)
        options = options or ExtractOptions()
        if options.counted is None:
            options = replace(options, counted=self.counted.given)
            self.counted.check_sample(self.check_layers(layers))
        saes = self.saes.mapped()
        return extract(
            corpus,
            self.loaded,
            {layer: saes[layer] for layer in self.check_layers(layers)},
            folder,
            options,
            None if progress is None else telling(progress),
            sae_device=None if torch.device(self.saes.device).type == "cpu" else self.saes.device,
            sae_source=self.saes.source,
            engine=engine,
            runner=runner,
        )

    def firings(
        self,
        source: Any,
        layers: Layers = None,
        options: ExtractOptions | None = None,
        *,
        name: str | None = None,
        features: Mapping[int, Sequence[int]] | None = None,
        reading: CorpusOptions | None = None,
        engine: Engine | None = None,
        runner: Runner | None = None,
        progress: Progress | None = None,
    ) -> Firings:
        """What fires on each document, and mean residuals, for `analysis.fit`, `.predict` and `.by_language`.

        It goes by way of a store in a temporary folder, which the workers of a `runner` must see.

        Args:
            options: as `extract`; residuals are pooled by `mean` in any case.
            name: of the documents; by default the source's.   features: only these of each layer.

        Raises:
            InputError: as `extract`, or no token of any document counts.
        """
        corpus = source if isinstance(source, Corpus) else Corpus.of(source, reading or CorpusOptions())
        options = replace(options or ExtractOptions(chat=reading.chat if reading else None), pool=("mean",))
        how: Any = {"layers": layers, "engine": engine, "runner": runner, "progress": progress}
        with temporary_folder() as folder, self.extract(corpus, folder / "s", options, **how) as store:
            return Firings.of(store, name or corpus.name, features)

    def feature_target(self, layer: int, feature: int) -> Target:
        """A target for sweeps and verdicts: the mean activation of a feature over the tokens of each text that count.

        It is 0 for a text without any.

        Raises:
            NotFoundError: no such layer.   InputError: no such feature.
        """
        (layer,) = self.check_layers([layer])
        if not 0 <= feature < (d_sae := self.saes[layer].d_sae):
            raise InputError(f"feature {feature} does not exist: this SAE has features 0 to {d_sae - 1}")

        def mean(texts: list[str]) -> np.ndarray:
            filled = [text or " " for text in texts]
            seen = self.features(filled, [layer], truncate=True)
            values = [seen.of(i, layer)[seen.counts(i, layer)].select([feature]) for i in range(len(filled))]
            return np.array([float(some.mean()) if len(some) else 0.0 for some in values])

        return mean

    @overload
    def generate(
        self,
        prompt: str,
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        decoding: Decoding | None = None,
        chat: Chat | None = None,
        candidates: int | None = None,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        decoding: Decoding | None = None,
        chat: Chat | None = None,
        candidates: int | None = None,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Any,
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        decoding: Decoding | None = None,
        chat: Chat | None = None,
        candidates: int | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several, with the residual stream changed on the way; see `qwen_scope.steer.generate`.

        Args:
            interventions: what is changed; none for the model as it is.
            decoding: by default greedy, 100 tokens.
            candidates: keep each token's probability and those of this many most probable tokens.

        Raises:
            InputError: an empty prompt, one that leaves no room in the context, a position past the end, a feature out
                of range, an amount that is absurd.
            NotFoundError, MismatchError: a layer that does not exist, or an SAE that does not fit.
        """
        interventions = [interventions] if isinstance(interventions, Intervention) else interventions
        prompts = as_texts(prompt)
        tools: Any = {"saes": self.saes, "stats": self.stats, "decoding": decoding, "chat": chat}
        out = generate(self.model, self.tokenizer, prompts, interventions, candidates=candidates, **tools)
        return out[0] if is_one(prompt) else out

    def hooks(
        self, model: Any = None, interventions: Intervention | Sequence[Intervention] = (), layers: Layers = None
    ) -> AbstractContextManager[HookedFeatures]:
        """Features out of, and interventions into, a model that somebody else's code runs inside of the block.

        Args:
            model: of transformers, a bridge of TransformerLens or a model of nnsight; by default the scope's own.
            layers: where features are read, under the interventions; by default all that have an SAE.

        Raises:
            MismatchError: a model of another size.   NotFoundError, InputError: as for `generate` and `check_layers`.
        """
        return hooked(self, model, interventions, layers)

    def check_layers(self, layers: Layers) -> list[int]:
        """The layers asked for, each with an SAE; all of them for None. One may stand for itself, as number or text.

        Raises:
            InputError: an empty list.
            NotFoundError: a layer that has no SAE.
        """
        layers = as_layers(layers)
        if layers is None:
            return list(self.saes.layers)
        if not layers:
            raise InputError(f"no layer given; there are SAEs for layers {brief(self.saes.layers)}")
        if missing := [layer for layer in layers if layer not in self.saes.layers]:
            raise NotFoundError(
                f"{self.saes.source} has no SAE for layer {brief(missing)}; it has layers {brief(self.saes.layers)}"
            )
        return sorted(set(layers))
