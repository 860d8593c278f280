"""Admission: what a request asks, resolved and checked against what the server has, before anything runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.files import read_object
from qwen_scope.model import HookPoint, LayerStats
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.steer import Intervention, Recipe, check_together

from .bounds import most_added
from .compiled import Compiled
from .library import Library
from .protocol import Ask, PromptKinds, Read, canonical
from .readout import MOST_BYTES, NUMBER, ROW
from .settings import ServeSettings
from .watch import Watch, check_fits, read_watches

REMEMBERED = 1024
"""Interventions that were found to fit, by fingerprint."""

ANY_LENGTH = 10**9
"""Longer than any prompt."""

STATS_VERSION = 1


@dataclass(frozen=True)
class ModelFacts:
    """What admission has to know of the served model.

    Attributes:
        layers: how many blocks.
        width: of the residual.
        dtype: the type of the residual.
        context: the most tokens of a request.
        signature: as `steer.signature`, which recipes name.
        follows: whether workers see each generated token before the next, so that its phase can be told.
    """

    layers: int
    width: int
    dtype: torch.dtype
    context: int
    signature: str
    follows: bool = True


class ServedSAEs:
    """`saes[layer]` of a server: each opened once, on one device, at the output of its layer.

    Raises:
        NotFoundError: no SAEs are served, or none for this layer.
        MismatchError: an SAE of another width, or one that reads another stream than the output of a block.
    """

    def __init__(self, settings: ServeSettings, width: int, device: torch.device | str = "cpu") -> None:
        self._settings, self._width, self._device = settings, width, device
        self._held: dict[int, SAE] = {}

    def __getitem__(self, layer: int) -> SAE:
        if layer not in self._held:
            self._held[layer] = self._opened(layer)
        return self._held[layer]

    def _opened(self, layer: int) -> SAE:
        source = self._settings.sae
        if source is None:
            raise NotFoundError("this server has no SAEs: it serves plain directions")
        if layer not in (known := layers_of(source)):
            raise NotFoundError(f"the server's SAEs have no layer {layer}; they have {', '.join(map(str, known))}")
        sae = load_sae(source, layer, k=self._settings.k, device=self._device)
        point = HookPoint.read_by(sae.hook_point, layer)
        if point.stream != "resid_post":
            raise MismatchError(f"the SAE of layer {layer} reads {point}; a server reads and changes resid_post")
        if sae.d_model != self._width:
            raise MismatchError(f"the SAE of layer {layer} reads {sae.d_model} dimensions, the model has {self._width}")
        return sae

    @property
    def nbytes(self) -> int:
        """Bytes of those that are open."""
        return sum(sae.nbytes for sae in self._held.values())


class Admission:
    """`admit` turns what a client asks into what a worker takes, or refuses it with one sentence.

    Nothing that a worker does with an admitted ask can fail on it: admission prepares the same objects.
    """

    def __init__(self, settings: ServeSettings, facts: ModelFacts) -> None:
        """Read what is served.

        Raises:
            NotFoundError: a layer that the model or the SAEs do not have, or a missing file.
            MismatchError: an SAE that does not fit.
            FormatError, InputError: statistics or watches that can't be read, or that this server could not evaluate.
        """
        self.settings, self.facts = settings, facts
        for layer in settings.touched:
            if layer >= facts.layers:
                raise NotFoundError(f"there is no layer {layer}: the model has layers 0 to {facts.layers - 1}")
        self.library = Library(settings.recipes, facts.signature, self._check_recipe)
        self.saes = ServedSAEs(settings, facts.width)
        for layer in {*settings.feature_layers, *settings.read_layers}:
            _ = self.saes[layer]
        self.stats = {} if settings.stats is None else read_stats(settings.stats)
        self.watches: tuple[Watch, ...] = () if settings.watch is None else read_watches(settings.watch)
        self._fits: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self.fit(Ask(watch=self.watches))

    def admit(self, ask: Ask, prompt: int, new: int, answers: int = 1) -> Ask:
        """The ask as workers take it: interventions listed, in raw units, in canonical order; the recipe's name gone.

        Args:
            prompt: tokens of the prompt.
            new: the most tokens that will be generated.
            answers: to this prompt.

        Raises:
            InputError, NotFoundError, MismatchError, FormatError: what cannot be served, in one sentence.
        """
        label = ask.recipe or ask.label or ("own" if ask.interventions else "none")
        admitted = self.fit(ask)
        self._check_tokens(admitted, prompt, new)
        if admitted.read is not None:
            _check_room(admitted.read, prompt, new, answers)
        told = ask.phases is not None and self.facts.follows and len(ask.phases.tokens) == prompt
        phases = ask.phases if admitted.by_phase or (admitted.watch and told) else None  # of watches, metrics tell them
        return replace(admitted, phases=phases, label=label if admitted.watch else "")

    def watched(self, ask: Ask) -> Ask:
        """The ask with the watches of the server, but for those that need phases where none are known.

        Raises:
            InputError: it has too many, or one of the same name.
        """
        mine = tuple(one for one in self.watches if ask.phases is not None or not one.by_phase)
        return replace(ask, watch=(*mine, *ask.watch)) if mine else ask

    def fit(self, ask: Ask) -> Ask:
        """The same but for what depends on the prompt, for recipes before any request names them.

        Raises:
            InputError, NotFoundError, MismatchError, FormatError: what cannot be served, in one sentence.
        """
        interventions = ask.interventions if ask.recipe is None else self.library.read(ask.recipe).interventions
        made = tuple(sorted((self._resolved(one) for one in interventions), key=lambda one: canonical(one.to_json())))
        check_together(made)
        if ask.read is not None:
            self._check_read(ask.read)
        watch = tuple(self._watch(one) for one in ask.watch)
        admitted = replace(ask, recipe=None, interventions=made, watch=watch)
        with self._lock:
            known = admitted.fingerprint in self._fits
        if made and not known:
            self._check_fit(made)
            with self._lock:  # requests are admitted in threads
                self._fits[admitted.fingerprint] = None
                while len(self._fits) > REMEMBERED:
                    self._fits.popitem(last=False)
        if later := [one for one in watch if one.then == "switch"]:
            self._check_switches(made, later)
        return admitted

    def _check_recipe(self, recipe: Recipe) -> None:
        """Admit it for whatever prompt; positions are checked when a request names it."""
        anywhere = PromptKinds(((0, 1),), "default", "answer")
        self.admit(Ask(interventions=recipe.interventions, phases=anywhere), 1, ANY_LENGTH)

    def _watch(self, watch: Watch) -> Watch:
        """With its interventions in raw units, at layers that are served."""
        check_fits(watch, self.settings.read_layers, self.saes)
        if watch.follows and not self.facts.follows:
            raise InputError(
                f"the watch {watch.name!r} has to know generated tokens in time, which asynchronous scheduling does not"
                " tell; start the server with --no-async-scheduling"
            )
        if watch.then != "switch":
            return watch
        given = watch.interventions if watch.recipe is None else self.library.read(watch.recipe).interventions
        return replace(watch, recipe=None, interventions=tuple(self._resolved(one) for one in given))

    def _check_switches(self, made: tuple[Intervention, ...], later: list[Watch]) -> None:
        """Whatever of them is switched on, and in whatever order, fits beside the request's own."""
        both = (*made, *(one for watch in later for one in watch.switched(0)))
        check_together(both)
        self._check_fit(both)
        adding = sum(any(one.op == "add" for one in watch.interventions) for watch in later)
        rows = (1 + Compiled.of(made, self.saes, "cpu", self.facts.dtype).rows) * 2**adding - 1
        if rows > self.settings.rows:
            raise InputError(
                f"what is added by the request and its watches can overlap in {rows} ways, of which this server keeps"
                f" {self.settings.rows} for a request; switch fewer recipes on, or start it with more rows"
            )

    def _resolved(self, one: Intervention) -> Intervention:
        """In raw units, at a layer that is served for it."""
        point, settings = one.hook_point, self.settings
        if point.stream != "resid_post":
            raise InputError(f"a server changes resid_post, not {point}")
        served = settings.adding if one.op == "add" else settings.feature_layers
        if point.layer not in served:
            listed = ", ".join(map(str, served)) or "none"
            raise NotFoundError(f"layer {point.layer} is not served for {one.op}; this server serves it at: {listed}")
        if one.direction is not None and len(one.direction) != self.facts.width:
            raise MismatchError(f"the direction has {len(one.direction)} numbers, the residual {self.facts.width}")
        sae = self.saes[point.layer] if one.feature is not None else None
        if not one.needs_stats:
            one.vector(sae)
            return one
        if point.layer not in self.stats:
            raise InputError(
                f"this server has no statistics of layer {point.layer}, which the unit {one.unit!r} needs; give the"
                " amount in the unit 'raw', or start it with --stats FILE"
            )
        return one.resolve(self.stats[point.layer], sae)

    def _check_tokens(self, ask: Ask, prompt: int, new: int) -> None:
        wheres = [one.where for one in ask.interventions] + ([ask.read.where] if ask.read else [])
        last = prompt + new - 2
        for where in wheres:
            if where.reach > max(last, prompt - 1):
                raise InputError(
                    f"position {where.reach} is past the end: a prompt of {prompt} tokens and {new} to generate have"
                    f" positions 0 to {last}"
                )
        if not ask.by_phase:
            return
        if ask.phases is None:
            raise InputError("phases of tokens are known in chats alone; name prompt, generated or positions instead")
        if not self.facts.follows and any(where.generated_phases for where in wheres):
            raise InputError(
                "phases of generated tokens are not known in time under asynchronous scheduling; start the server with"
                " --no-async-scheduling"
            )
        told = len(ask.phases.tokens)
        if told != prompt:
            raise InputError(f"the phases of {told} tokens are given for a prompt of {prompt}")

    def _check_read(self, read: Read) -> None:
        for layer in read.layers:
            if layer not in self.settings.read_layers:
                listed = ", ".join(map(str, self.settings.read_layers)) or "none"
                raise NotFoundError(f"layer {layer} is not served for reading; this server reads at: {listed}")
            for feature in read.named_at(layer):
                if feature >= (count := self.saes[layer].d_sae):
                    raise NotFoundError(
                        f"feature {layer}/{feature} does not exist: the SAE has features 0 to {count - 1}"
                    )

    def _check_fit(self, interventions: tuple[Intervention, ...]) -> None:
        """Prepare them as a worker will, count the rows they can need, and bound what they can do to the residual."""
        compiled = Compiled.of(interventions, self.saes, "cpu", self.facts.dtype)
        if compiled.rows > self.settings.rows:
            raise InputError(
                f"the places of the interventions overlap in {compiled.rows} ways, of which this server keeps"
                f" {self.settings.rows} for a request; name fewer places, or start it with more rows"
            )
        bound = most_added(self.facts.dtype)
        for layer, vectors in compiled.added().items():
            if (largest := sum(float(vector.abs().max()) for vector in vectors)) > bound:
                raise InputError(
                    f"up to {largest:.3g} is added to a number of the residual at layer {layer}; this server, whose"
                    f" model is in {str(self.facts.dtype).removeprefix('torch.')}, adds at most {bound:.3g}"
                )


def _check_room(read: Read, prompt: int, new: int, answers: int) -> None:
    """Refuse a read of more than workers keep: its first tokens would be gone when it is fetched."""
    where = read.where
    tokens = prompt * bool(where.prompt or where.prompt_phases) + new * bool(where.generated or where.generated_phases)
    tokens = answers * min(tokens + sum(last - first + 1 for first, last in where.spans), prompt + new)
    row = sum(ROW + NUMBER * (read.top or len(read.named_at(layer))) for layer in read.layers)
    if tokens * row > MOST_BYTES:
        raise InputError(
            f"activations of up to {tokens:,} tokens at {len(read.layers)} layers take {tokens * row >> 20:,} MiB, of"
            f" which this server keeps {MOST_BYTES >> 20}; read fewer tokens, layers or features, or give max_tokens"
        )


def write_stats(stats: Mapping[int, LayerStats]) -> str:
    """The text of a file that `read_stats` reads."""
    return canonical({"version": STATS_VERSION, "stats": [one.to_json() for _, one in sorted(stats.items())]})


def read_stats(path: str) -> dict[int, LayerStats]:
    """Statistics by layer.

    Raises:
        NotFoundError: there is no such file.   FormatError: it holds something else.
    """
    data = read_object(path)
    if data.get("version") != STATS_VERSION or not isinstance(data.get("stats"), list):
        raise FormatError(f"{path} holds no statistics of version {STATS_VERSION}")
    found = [LayerStats.from_json(one) for one in data["stats"]]
    return {one.hook_point.layer: one for one in found}
