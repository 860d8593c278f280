"""`Counted`: which tokens count, the same in every command; the others would outweigh all else in a mean or a loss."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import FormatError, InputError, NotFoundError, brief, check_count, check_number
from qwen_scope.files import Fields

from .phases import PHASES
from .sinks import point_name, thresholds
from .tally import REASONS
from .tokenize import Tokens, special_ids

VERSION = 1
_MOST_IDS = 2**31 - 1
_MOST_SPECIAL = 2**16  # no vocabulary comes near; a run of ids in a file is short and its set is not
_APART = 2.0  # thresholds measured on two samples of one model differ by less than this factor

_SHORT = reprlib.Repr()  # some tokenizers have thousands of special ids
_SHORT.maxdict, _SHORT.maxstring = 128, 200


@dataclass(frozen=True)
class Counted:
    """Which tokens count for statistics, training and analyses.

    A token is left out because of its place, its id, its phase or its norm. `Counted()` leaves out the first token of a
    row alone, `Counted.of(tokenizer)` special tokens too, `measure` adds a threshold per hook point for sinks at other
    places, and `Counted.everything()` leaves out padding alone.

    Positions count from the first real token of a row, as attention sees it: a document that is packed behind another
    has no sink at its first token. Where attention does not cross documents, give `positions` that begin anew.

    Attributes:
        first: how many tokens at the beginning of a row do not count.
        special: token ids that do not count, BOS and chat markup among them.
        norms: per hook point (`layers.12.resid_post`) the norm above which a token is a sink; None where no norm tells.
            Empty where it was not measured: then no token is left out for its norm.
        phases: the phases whose tokens count; None for all.
        sample: what the thresholds were measured on, in words.
        tokens: how many tokens they were measured on.

    Raises:
        InputError: a value that does not fit.
    """

    first: int = 1
    special: frozenset[int] = frozenset()
    norms: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    phases: frozenset[str] | None = None
    sample: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        _set(self, "first", check_count("first", self.first, 0, 2**31 - 1))
        _set(self, "tokens", check_count("tokens", self.tokens, 0, 2**63 - 1))
        _set(self, "special", frozenset(check_count("a special id", i, 0, _MOST_IDS) for i in self.special))
        if not isinstance(self.norms, Mapping):
            raise InputError(f"norms maps hook points to thresholds; got {brief(self.norms)}")
        _set(self, "norms", {point_name(at): _norm(at, norm) for at, norm in self.norms.items()})
        if not isinstance(self.sample, str):
            raise InputError(f"sample is a text, not {brief(self.sample)}")
        if self.phases is not None:
            _set(self, "phases", _phases(self.phases))

    def __repr__(self) -> str:
        return f"Counted({', '.join(f'{one.name}={_SHORT.repr(getattr(self, one.name))}' for one in fields(self))})"

    @classmethod
    def everything(cls) -> Counted:
        """Every token counts, sinks and special ones too; padding never does."""
        return cls(first=0)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, first: int = 1, phases: Iterable[str] | None = None) -> Counted:
        """Without the first tokens of a row and without the tokens that a tokenizer calls special.

        `<think>` and `<tool_call>` are no special tokens in Qwen's tokenizers; ask for phases to leave them out.
        """
        return cls(first, special_ids(tokenizer), phases=None if phases is None else _phases(phases))

    def measure(
        self,
        norms: Mapping[Any, Float[np.ndarray, " tokens"]],
        positions: Int[np.ndarray, " tokens"],
        *,
        ids: Int[np.ndarray, " tokens"] | None = None,
        sample: str = "",
    ) -> Counted:
        """The same with thresholds for sinks, from residual norms of a sample. See `qwen_scope.text.sinks`.

        Args:
            norms: by hook point or layer, of the same real tokens (no padding) in the same order. Give every layer of
                the model: a layer is judged with the help of its neighbours.
            positions: of each token in its row, from 0.
            ids: of each token, so that special ones are left out of the sample.
            sample: what the tokens are, in words.

        Raises:
            InputError: fewer than 100 ordinary tokens, or arrays that do not fit each other.
            FormatError: a norm is negative or NaN.
        """
        if ids is not None and ids.shape != positions.shape:
            raise InputError(f"there are {len(ids)} ids and {len(positions)} positions")
        ordinary = positions >= max(self.first, 1)
        if ids is not None:
            ordinary &= ~np.isin(ids, sorted(self.special))
        named = {point_name(at): size for at, size in norms.items()}
        found = thresholds(named, ordinary, positions == 0)
        return replace(self, norms=found, sample=sample, tokens=len(positions))

    def at(
        self,
        ids: Int[Tensor, "*batch seq"],
        positions: Int[Tensor, "*batch seq"] | None = None,
        phases: Int[Tensor, "*batch seq"] | None = None,
        mask: Tensor | None = None,
    ) -> Bool[Tensor, "*batch seq"]:
        """Where tokens count as far as place, id and phase tell; sinks at other places need the residual.

        Args: as `reasons`.

        Raises:
            InputError: as `reasons`.
        """
        return self.reasons(ids, positions, phases, mask) == 0

    def sinks(self, h: Float[Tensor, "*any d_model"], layer: Any) -> Bool[Tensor, "*any"]:
        """Where residuals are longer than the threshold of their hook point.

        Norms are taken in fp32 (fp64 for fp64), so half precision does not overflow. A residual that is not finite is a
        sink where there is a threshold: no mean can take it.

        Raises:
            NotFoundError: thresholds were measured, but none at this hook point.
        """
        name = point_name(layer)
        if self.norms and name not in self.norms:
            raise NotFoundError(f"no threshold for sinks was measured at {name}; there is one at {_some(self.norms)}")
        limit = self.norms.get(name)
        if limit is None:
            return torch.zeros(h.shape[:-1], dtype=torch.bool, device=h.device)
        kind = torch.float64 if h.dtype == torch.float64 else torch.float32
        return ~(torch.linalg.vector_norm(h, dim=-1, dtype=kind) <= limit)

    def keep(
        self,
        h: Float[Tensor, "*batch seq d_model"],
        layer: Any,
        ids: Int[Tensor, "*batch seq"],
        positions: Int[Tensor, "*batch seq"] | None = None,
        phases: Int[Tensor, "*batch seq"] | None = None,
        mask: Tensor | None = None,
    ) -> Bool[Tensor, "*batch seq"]:
        """Where tokens count at a hook point, by everything this knows; on the device of `h`.

        Args: `h` and `layer` as `sinks`, the rest as `reasons`.

        Raises:
            InputError, NotFoundError: as `reasons` and `sinks`.
        """
        return self.at(ids, positions, phases, mask).to(h.device) & ~self.sinks(h, layer)

    def reasons(
        self,
        ids: Int[Tensor, "*batch seq"],
        positions: Int[Tensor, "*batch seq"] | None = None,
        phases: Int[Tensor, "*batch seq"] | None = None,
        mask: Tensor | None = None,
        sinks: Bool[Tensor, "*batch seq"] | None = None,
    ) -> UInt8[Tensor, "*batch seq"]:
        """Why each token is left out: an index into `REASONS`, 0 where it counts.

        Args:
            ids: token ids, one row or a batch of rows.
            positions: in the row as attention sees it, from 0; None counts real tokens from the left.
            phases: indices into `PHASES`.
            mask: the attention mask, 1 or True for a token, 0 for padding on either side; None for no padding.
            sinks: what `sinks` says of the same tokens.

        Raises:
            InputError: a shape that differs from that of `ids`, or no phases where only some phases count.
        """
        for name, value in (("positions", positions), ("phases", phases), ("mask", mask), ("sinks", sinks)):
            if value is not None and value.shape != ids.shape:
                raise InputError(f"{name} has the shape {tuple(value.shape)} and ids {tuple(ids.shape)}")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) != 0
        if positions is None:
            positions = real.long().cumsum(-1) - 1
        out = torch.zeros(ids.shape, dtype=torch.uint8, device=ids.device)
        if sinks is not None:
            _mark(out, sinks, "sink")
        if self.phases is not None:
            if phases is None:
                raise InputError(f"only tokens of {_listed(self.phases)} count, but these tokens have no phases")
            _mark(out, ~_within(phases, [i for i, name in enumerate(PHASES) if name in self.phases]), "phase")
        _mark(out, positions < self.first, "first")
        _mark(out, _within(ids, sorted(self.special)), "special")
        _mark(out, ~real, "padding")
        return out

    def reasons_of(self, tokens: Tokens, sinks: Bool[Tensor, "batch seq"] | None = None) -> UInt8[Tensor, "batch seq"]:
        """`reasons` of texts, with their phases where only some phases count.

        Raises:
            InputError: only some phases count, and a chat template gives no markers to tell them by.
        """
        phases = None
        if self.phases is not None:
            phases = torch.zeros_like(tokens.input_ids)
            for i, length in enumerate(tokens.lengths):
                phases[i, :length] = torch.from_numpy(tokens.phases(i)[1]).to(phases)
        return self.reasons(tokens.input_ids, phases=phases, mask=tokens.attention_mask, sinks=sinks)

    def difference(self, other: Counted, names: tuple[str, str] = ("one", "the other")) -> str | None:
        """A sentence that says where two of them count other tokens, or None where they count the same.

        Thresholds of two samples of one model differ a little: less than a factor of 2 is no difference.
        Samples are not compared, nor hook points that only one of them has.

        Args:
            names: what the sentence calls this one and the other one.
        """
        parts = []
        if self.first != other.first:
            parts.append(("the first tokens of a row left out", str(self.first), str(other.first)))
        if self.special != other.special:
            a, b = (f"{len(x.special)} ids" for x in (self, other))
            parts.append(("special tokens left out", a, b if a != b else f"{b} that differ"))
        if self.phases != other.phases:
            a, b = ("all" if x.phases is None else _listed(x.phases) for x in (self, other))
            parts.append(("phases that count", a, b))
        if bool(self.norms) != bool(other.norms):
            a, b = ("measured" if x.norms else "none" for x in (self, other))
            parts.append(("thresholds for sinks", a, b))
        apart = [at for at in self.norms if at in other.norms and _differ(self.norms[at], other.norms[at])]
        if apart:
            a, b = (_shown(x.norms[apart[0]]) for x in (self, other))
            parts.append((f"the threshold for sinks at {apart[0]}", a, b))
        if not parts:
            return None
        said = "; ".join(f"{what}: {a} in {names[0]}, {b} in {names[1]}" for what, a, b in parts)
        return f"{names[0]} and {names[1]} count other tokens: {said}"

    def to_json(self) -> dict[str, Any]:
        """As values of JSON; `from_json` gives back an equal object."""
        return {
            "version": VERSION,
            "first": self.first,
            "special": _runs(self.special),
            "norms": dict(self.norms),
            "phases": None if self.phases is None else [name for name in PHASES if name in self.phases],
            "sample": self.sample,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, data: Any, what: str = "the record of which tokens count") -> Counted:
        """What `to_json` wrote.

        Args:
            what: what an error calls it.

        Raises:
            FormatError: a key is missing or unknown, or a value does not fit.
        """
        fields = Fields(data, what, ["version", "first", "special", "norms", "phases", "sample", "tokens"])
        fields.header(VERSION)
        special: list[int] = []
        for run in fields.items("special"):
            pair = Fields({"special": run}, what).counts("special", 0, _MOST_IDS)
            if len(pair) != 2 or pair[0] > pair[1] or (special and pair[0] <= special[-1]):
                raise FormatError(
                    f"'special' of {what} holds pairs [first id, last id] in ascending order, not {brief(run)}"
                )
            if len(special) + pair[1] - pair[0] >= _MOST_SPECIAL:
                raise FormatError(f"'special' of {what} holds more than {_MOST_SPECIAL:,} ids")
            special += range(pair[0], pair[1] + 1)
        phases = fields.maybe(fields.items, "phases")
        try:
            return cls(
                first=fields.count("first", 0, 2**31 - 1),
                special=frozenset(special),
                norms={at: _norm(at, norm) for at, norm in fields.object("norms").items()},
                phases=None if phases is None else _phases(phases),
                sample=fields.text("sample"),
                tokens=fields.count("tokens"),
            )
        except InputError as error:
            raise FormatError(f"{what} does not fit: {error}") from error


def _set(counted: Counted, name: str, value: object) -> None:
    object.__setattr__(counted, name, value)


def _norm(at: object, norm: object) -> float | None:
    return (
        None
        if norm is None
        else check_number(f"the threshold at {point_name(at)}", norm, float(np.finfo(np.float32).tiny))
    )


def _phases(phases: object) -> frozenset[str]:
    if isinstance(phases, str) or not isinstance(phases, Iterable):
        raise InputError(f"phases is a list of {', '.join(PHASES)}; got {brief(phases)}")
    given = list(phases)
    for name in given:
        if not isinstance(name, str) or name not in PHASES:
            raise InputError(f"a phase is one of {', '.join(PHASES)}, not {brief(name)}")
    if not given:
        raise InputError(f"at least one phase has to count, of {', '.join(PHASES)}")
    return frozenset(given)


def _within(values: Tensor, known: list[int]) -> Tensor:
    return torch.isin(values, torch.tensor(known, dtype=torch.int64, device=values.device))


def _mark(out: Tensor, where: Tensor, reason: str) -> None:
    out[where.to(out.device)] = REASONS.index(reason)


def _differ(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is not b
    return max(a, b) > _APART * min(a, b)


def _shown(norm: float | None) -> str:
    return "none" if norm is None else f"{norm:.4g}"


def _listed(phases: Iterable[str]) -> str:
    return ", ".join(name for name in PHASES if name in set(phases))


def _some(norms: Mapping[str, object]) -> str:
    return ", ".join(list(norms)[:3]) + (f" and {len(norms) - 3} more" if len(norms) > 3 else "")


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Sorted ids as runs [first, last]; Gemma's 6,249 special ids are five of them."""
    ordered = sorted(ids)
    breaks = [i for i, (a, b) in enumerate(pairwise(ordered), start=1) if b != a + 1]
    edges = [0, *breaks, len(ordered)]
    return [[ordered[a], ordered[b - 1]] for a, b in pairwise(edges) if a < b]
