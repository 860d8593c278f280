"""`Desk`: what all visitors share. One model and its SAEs, what was read lately, and the limits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_scope.errors import InputError
from qwen_scope.sae import SAE
from qwen_scope.scope import Scope, TokenFeatures

from .pieces import Named

ChatMode = Literal["thinking", "non_thinking"]

CHATS: dict[str, ChatMode | None] = {"plain": None, "thinking": "thinking", "non_thinking": "non_thinking"}
"""How a text is put to the model, by the name the page and the API use."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for.

    Attributes:
        characters: of a text.
        new_tokens: of a generation.
        upload_bytes: of a file.
        set_texts: texts of an uploaded set.
        remembered_bytes: of activations kept for all visitors together.
    """

    characters: int = 20_000
    new_tokens: int = 300
    upload_bytes: int = 2_000_000
    set_texts: int = 500
    remembered_bytes: int = 128_000_000


class Desk:
    """One model in memory for all visitors; safe to share between threads.

    Attributes:
        scope: the model and its SAEs, which are kept by bytes.
        stores: by name, the folders that the page may open; it can reach no other.
        limits: what one visitor may ask for.
    """

    def __init__(self, scope: Scope, stores: Mapping[str, Path] | None = None, limits: Limits | None = None) -> None:
        self.scope, self.stores, self.limits = scope, dict(stores or {}), limits or Limits()
        self._seen: OrderedDict[tuple[str, str, int], TokenFeatures] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def layers(self) -> list[int]:
        return self.scope.layers

    def check_text(self, text: str, what: str = "text") -> str:
        """The text, if it is one that may be read.

        Raises:
            InputError: it is empty or too long.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the {what} is empty; write or paste one")
        if len(text) > self.limits.characters:
            raise InputError(
                f"the {what} has {len(text):,} characters and this page reads up to {self.limits.characters:,};"
                " shorten it, or use qwen-scope extract for a corpus"
            )
        return text

    def chat(self, name: str) -> ChatMode | None:
        """The chat mode of that name; raises InputError for another."""
        if name not in CHATS:
            raise InputError(f"a text is put to the model as one of {', '.join(CHATS)}, not {name!r}")
        return CHATS[name]

    def seen(self, text: str, layer: int, chat: str = "plain") -> TokenFeatures:
        """The features of one text at one layer; what was read lately is not read again.

        Raises:
            InputError, NotFoundError: as `Scope.features` does.
        """
        key = (self.check_text(text), chat, layer)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        found = self.scope.features([text], [layer], chat=self.chat(chat))
        with self._lock:
            self._seen[key] = found
            while len(self._seen) > 1 and self.remembered_bytes > self.limits.remembered_bytes:
                self._seen.popitem(last=False)
        return found

    @property
    def remembered_bytes(self) -> int:
        """Bytes of the activations that are kept."""
        return sum(size_of(found) for found in self._seen.values())

    def label(self, layer: int, feature: int) -> Named | None:
        """The label of a feature with its score, where one exists."""
        return None

    def check_feature(self, layer: int, feature: int) -> SAE:
        """The SAE of the layer, if it has such a feature.

        Raises:
            NotFoundError: no such layer.   InputError: no such feature.
        """
        (layer,) = self.scope.check_layers([layer])
        sae = self.scope.saes[layer]
        if not 0 <= feature < sae.d_sae:
            raise InputError(
                f"there is no feature {feature} in layer {layer}: its SAE has features 0 to {sae.d_sae - 1}"
            )
        return sae


def size_of(found: TokenFeatures) -> int:
    """Bytes of the tensors of what was seen."""
    tensors = [t for acts in found.acts.values() for t in (acts.indices, acts.values)]
    return sum(t.numel() * t.element_size() for t in [*tensors, found.input_ids, found.mask])


def whole_number(value: object, what: str) -> int:
    """A whole number from a field of the page.

    Raises:
        InputError: it is empty or something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"give the {what} as a whole number")
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"the {what} is a whole number, not {value!r:.40}") from None
    if not number.is_integer():
        raise InputError(f"the {what} is a whole number, not {value!r:.40}")
    return int(number)
