"""The request field `qwen_scope`: what one request asks for, as a value, strict JSON both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int

from qwen_scope.errors import FormatError, InputError, check_count, check_name, nearest
from qwen_scope.files import Fields, parse_object
from qwen_scope.sae import feature_name, parse_feature
from qwen_scope.steer import Intervention, Where
from qwen_scope.text import CHATS, PHASES

from .watch import Watch, check_watches

FIELD = "qwen_scope"
"""The name of the field in a request's body, in vLLM's `extra_args` and in its `additional_config`."""

MOST_CHARACTERS = 4 * 10**6
"""Of one request's field; a direction of 8,192 numbers is about 160,000."""

MOST_REMEMBERED = 10**5
"""Characters of a field that is kept after it was read."""

MOST_INTERVENTIONS = 256
MOST_TOP = 256
"""Of features that are read per token and layer."""

MOST_NAMED = 1024
TICKET = 64

_CLIENT = ("recipe", "interventions", "read", "watch")


@dataclass(frozen=True)
class Read:
    """Which activations a request wants back.

    Attributes:
        layers: at which layers, in ascending order.
        top: of every token the so many strongest features; None where `features` are named.
        features: named features as (layer, feature), in ascending order; empty where `top` is given.
        where: of which tokens.

    Raises:
        InputError: neither or both ways of choosing features, too many of them, or no token.
    """

    layers: tuple[int, ...]
    top: int | None
    features: tuple[tuple[int, int], ...]
    where: Where

    def __post_init__(self) -> None:
        if (self.top is None) == (not self.features):
            raise InputError("a read names layers and the number of strongest features `top`, or `features`, not both")
        if self.top is not None:
            check_count("`top` of a read", self.top, 1, MOST_TOP)
        if len(self.features) > MOST_NAMED:
            raise InputError(f"a read names at most {MOST_NAMED} features; got {len(self.features)}")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError("the layers of a read are named once each")
        if self.where.nowhere:
            raise InputError("the read covers no token; say where, such as 'generated'")

    def named_at(self, layer: int) -> list[int]:
        """The named features of one layer."""
        return [feature for at, feature in self.features if at == layer]

    @classmethod
    def from_json(cls, data: Any) -> Read:
        """`{"layers": [4], "top": 5, "where": "all"}` or `{"features": ["4/678"], "where": "generated"}`.

        Raises:
            FormatError, InputError: anything else.
        """
        read = Fields(data, "`read`", (), ("layers", "top", "features", "where"))
        where = Where.parse(read.text("where")) if "where" in data else Where.parse("all")
        if "features" in data:
            named = tuple(sorted({parse_feature(name) for name in read.items("features")}))
            if "layers" in data or "top" in data or not named:
                raise InputError("a read that names `features` such as '4/678' has no `layers` and no `top`")
            return cls(tuple(sorted({layer for layer, _ in named})), None, named, where)
        if "layers" not in data:
            raise FormatError("`read` lacks 'layers'; name them, or `features` such as '4/678'")
        return cls(tuple(sorted(set(read.counts("layers")))), read.count("top", 1) if "top" in data else 5, (), where)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        where = {"where": str(self.where)}
        if self.top is None:
            return {"features": [feature_name(*one) for one in self.features], **where}
        return {"layers": list(self.layers), "top": self.top, **where}


@dataclass(frozen=True)
class PromptKinds:
    """The phases of a prompt's tokens and of those that follow, as they ride beside a request that needs them.

    Attributes:
        runs: the phases of the prompt's tokens as (index into `PHASES`, number of tokens).
        chat: the mode that the prompt was rendered in, None for a plain text.
        first: the phase of the first generated token.

    Raises:
        InputError: an unknown phase or mode, or a run without tokens.
    """

    runs: tuple[tuple[int, int], ...]
    chat: str | None
    first: str

    def __post_init__(self) -> None:
        if self.chat is not None and self.chat not in CHATS:
            raise InputError(f"a chat is rendered in one of the modes {', '.join(CHATS)}")
        if self.first not in ("text", "thinking", "answer") or (self.chat is None) != (self.first == "text"):
            raise InputError("a generation begins in text, or in a chat in thinking or answer")
        for phase, count in self.runs:
            check_count("a phase of a prompt", phase, 0, len(PHASES) - 1)
            check_count("a run of phases", count, 1)

    @classmethod
    def of(cls, phases: Sequence[int], chat: str | None, first: str) -> PromptKinds:
        """From the phase of each token of the prompt, as indices into `PHASES`."""
        runs: list[list[int]] = []
        for phase in phases:
            if runs and runs[-1][0] == phase:
                runs[-1][1] += 1
            else:
                runs.append([int(phase), 1])
        return cls(tuple((phase, count) for phase, count in runs), chat, first)

    @property
    def tokens(self) -> Int[np.ndarray, " prompt"]:
        """The phase of each token of the prompt."""
        kinds = np.array([phase for phase, _ in self.runs], np.int8)
        return np.repeat(kinds, [count for _, count in self.runs])

    @classmethod
    def from_json(cls, data: Any) -> PromptKinds:
        """What `to_json` wrote.

        Raises:
            FormatError, InputError: anything else.
        """
        found = Fields(data, "`phases`", ("runs", "chat", "first"))
        runs: list[tuple[int, int]] = []
        for pair in found.items("runs"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise FormatError("`runs` of `phases` holds pairs of a phase and a number of tokens")
            phase, count = Fields({"run": pair}, "a run of `phases`").counts("run")
            runs.append((phase, count))
        return cls(tuple(runs), found.maybe(found.text, "chat"), found.text("first"))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"runs": [list(run) for run in self.runs], "chat": self.chat, "first": self.first}


@dataclass(frozen=True)
class Ask:
    """What one request asks of the plugin.

    Attributes:
        recipe: the name of a recipe of the server, or None.
        interventions: what is done to the stream; with `recipe`, none.
        read: which activations come back, or None.
        ticket: under which the read-out is fetched from the workers. The server chooses it.
        phases: of the prompt's tokens, where an intervention, a read or a watch names phases. The server finds them.
        watch: rules that are asked of its tokens.
        label: what metrics call its recipe. The server chooses it.
        end: the token that ends the answer where a watch stops it. The server finds it.
    """

    recipe: str | None = None
    interventions: tuple[Intervention, ...] = ()
    read: Read | None = None
    ticket: str = ""
    phases: PromptKinds | None = None
    watch: tuple[Watch, ...] = ()
    label: str = ""
    end: int = -1

    def __post_init__(self) -> None:
        if self.recipe is not None:
            check_name("a recipe", self.recipe)
            if self.interventions:
                raise InputError("a request names a recipe or lists interventions, not both")
        if len(self.interventions) > MOST_INTERVENTIONS:
            raise InputError(f"a request has at most {MOST_INTERVENTIONS} interventions; got {len(self.interventions)}")
        if len(self.ticket) > TICKET or not self.ticket.isascii():
            raise InputError(f"a ticket has at most {TICKET} characters, all ASCII")
        check_watches(self.watch)
        if self.label:
            check_name("a label", self.label)

    @property
    def empty(self) -> bool:
        """Whether the plugin has nothing to do."""
        return self.recipe is None and not self.interventions and self.read is None and not self.watch

    @property
    def by_phase(self) -> bool:
        """Whether the phases of tokens have to be known."""
        wheres = [one.where for one in self.interventions] + ([self.read.where] if self.read else [])
        return any(where.by_phase for where in wheres) or any(watch.by_phase for watch in self.watch)

    @classmethod
    def from_body(cls, data: Any) -> Ask:
        """The field as a client writes it: `recipe` or `interventions`, `read` and `watch`.

        Raises:
            FormatError, InputError, NotFoundError: anything else, in one sentence.
        """
        return cls._read(data, _CLIENT)

    @classmethod
    def from_text(cls, text: Any) -> Ask:
        """The field as it travels in vLLM's `extra_args`: JSON of what a client writes and a server adds.

        Raises:
            FormatError, InputError, NotFoundError: anything else, in one sentence.
        """
        if not isinstance(text, str):
            raise FormatError(f"{FIELD!r} of vllm_xargs is a text of JSON; in the body of a request it is an object")
        if len(text) > MOST_CHARACTERS:
            raise FormatError(f"{FIELD!r} has {len(text):,} characters, of which {MOST_CHARACTERS:,} are read")
        return _parsed(text) if len(text) <= MOST_REMEMBERED else _parsed.__wrapped__(text)

    @classmethod
    def _read(cls, data: Any, keys: Sequence[str]) -> Ask:
        if isinstance(data, Mapping) and (unknown := [key for key in data if key not in keys]):
            raise FormatError(f"{FIELD!r} has no key {str(unknown[0])[:60]!r}; {nearest(str(unknown[0])[:60], keys)}")
        ask = Fields(data, f"{FIELD!r}", (), keys)
        listed = ask.maybe(ask.items, "interventions") or []
        if len(listed) > MOST_INTERVENTIONS:
            raise InputError(f"a request has at most {MOST_INTERVENTIONS} interventions; got {len(listed)}")
        return cls(
            ask.maybe(ask.text, "recipe"),
            tuple(Intervention.from_json(one) for one in listed),
            ask.maybe(lambda key: Read.from_json(ask[key]), "read"),
            ask.maybe(ask.text, "ticket") or "",
            ask.maybe(lambda key: PromptKinds.from_json(ask[key]), "phases"),
            tuple(Watch.from_json(one) for one in ask.maybe(ask.items, "watch") or ()),
            ask.maybe(ask.text, "label") or "",
            ask.count("end") if "end" in ask.data else -1,
        )

    def to_text(self) -> str:
        """Canonical JSON, which `from_text` reads back: equal asks give equal texts."""
        data: dict[str, Any] = {}
        if self.recipe is not None:
            data["recipe"] = self.recipe
        if self.interventions:
            data["interventions"] = [one.to_json() for one in self.interventions]
        if self.read is not None:
            data["read"] = self.read.to_json()
        if self.ticket:
            data["ticket"] = self.ticket
        if self.phases is not None:
            data["phases"] = self.phases.to_json()
        if self.watch:
            data["watch"] = [one.to_json() for one in self.watch]
        if self.label:
            data["label"] = self.label
        if self.end >= 0:
            data["end"] = self.end
        return canonical(data)

    @cached_property
    def fingerprint(self) -> str:
        """Tells apart what is done to the stream, in whatever order it was listed; what is read does not matter."""
        return fingerprint(self.interventions)


@lru_cache(maxsize=32)
def _parsed(text: str) -> Ask:
    """A recipe comes with many requests, and with each to several processes: it is read once while it is in use."""
    data = parse_object(text, f"{FIELD!r}")
    return Ask._read(data, (*_CLIENT, "ticket", "phases", "label", "end"))


def text_of(params: Any) -> str | None:
    """The field in a request's sampling parameters, None where it has none."""
    return (getattr(params, "extra_args", None) or {}).get(FIELD)


def fingerprint(interventions: Sequence[Intervention]) -> str:
    """128 bits of SHA-256 over the interventions; the same for every order of them."""
    listed = sorted(canonical(one.to_json()) for one in interventions)
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:32]


def canonical(data: Any) -> str:
    """JSON without spaces, keys in order; NaN is refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
