"""`Job`: an extraction as plain data that goes to other processes, and what runs one there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from qwen_scope.errors import MismatchError
from qwen_scope.files import Remote, place
from qwen_scope.sae import SAE
from qwen_scope.store import write_window
from qwen_scope.text import Chat, Corpus, Counted

from .encoding import HOLD_BYTES, encode_window
from .engine import Engine
from .rows import Pieces, Reader, State

FIRST_WINDOW = 2**11


@dataclass(frozen=True, eq=False)
class Job:
    """The windows of an extraction that are not in its store yet, and how each becomes parts of it.

    Windows end where documents do, so each can be read and encoded without any other, in any process that sees the
    store's folder.

    Attributes:
        corpus, tokenizer: what the windows are read from, and with.
        state: from where on.   first: the number of the first window.
        window_tokens: of the largest window, but for a longer document.
        row_tokens, max_tokens, chat, need_phases: as `Reader`.
        counted, pool, hold_bytes: as `encode_window`.   batch_tokens: of a forward pass.
        fingerprints: by layer, of the SAEs.
        folder: of the store.
    """

    corpus: Corpus
    tokenizer: Any
    state: State
    first: int
    window_tokens: int
    row_tokens: int
    max_tokens: int | None
    chat: Chat | None
    need_phases: bool
    counted: Counted
    pool: tuple[str, ...]
    batch_tokens: int
    fingerprints: Mapping[int, str]
    folder: Path | Remote
    hold_bytes: int = HOLD_BYTES

    def plain(self) -> dict[str, Any]:
        """All but corpus and tokenizer, as JSON has it."""
        kept = {name: value for name, value in vars(self).items() if name not in ("corpus", "tokenizer")}
        kept |= {"state": asdict(self.state), "counted": self.counted.to_json(), "folder": str(self.folder)}
        return {**kept, "fingerprints": {str(layer): name for layer, name in self.fingerprints.items()}}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], corpus: Corpus, tokenizer: Any) -> Job:
        """The job that `plain` gave, on another process's corpus and tokenizer."""
        made = {
            "state": State(**data["state"]),
            "counted": Counted.from_json(data["counted"], "which tokens count"),
            "pool": tuple(data["pool"]),
            "fingerprints": {int(layer): name for layer, name in data["fingerprints"].items()},
            "folder": place(data["folder"]),
        }
        return cls(corpus, tokenizer, **{**data, **made})

    def windows(self) -> Iterator[tuple[int, str]]:
        """Each window with its number, in order, as `Pieces.to_json` writes it."""
        reader = Reader(
            self.corpus, self.tokenizer, self.state, self.row_tokens, self.max_tokens, self.chat, self.need_phases
        )
        number, size = self.first, min(self.state.window or FIRST_WINDOW, self.window_tokens)
        while (pieces := reader.window(size, whole=True)).rows or pieces.unreadable:
            size = min(2 * size, self.window_tokens)
            yield number, replace(pieces, after=replace(pieces.after, window=size)).to_json()
            number += 1

    def write(
        self,
        number: int,
        window: str,
        engine: Engine,
        saes: Mapping[int, SAE],
        sae_device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Read and encode a window that `windows` gave and write its parts.

        Returns what `StoreWriter.keep` takes, with the `state` after the window.

        Raises:
            InputError: the disk is full.
        """
        pieces = Pieces.from_json(window)
        made, _ = encode_window(
            engine,
            saes,
            pieces,
            counted=self.counted,
            pool=self.pool,
            carried=self.state.carried if number == self.first else {},
            report=lambda tokens: None,
            device=sae_device,
            hold_bytes=self.hold_bytes,
        )
        return {**write_window(self.folder, number, made), "state": asdict(pieces.after)}

    def check(self, saes: Mapping[int, SAE]) -> None:
        """Refuse SAEs other than those of the extraction.

        Raises:
            MismatchError: a worker has found others under the same name.
        """
        for layer, fingerprint in self.fingerprints.items():
            if saes[layer].identity.fingerprint != fingerprint:
                raise MismatchError(
                    f"a worker found another SAE for layer {layer} than {fingerprint}: {saes[layer].identity}"
                )


@runtime_checkable
class Runner(Protocol):
    """Runs the windows of a job, in processes of its own."""

    def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
        """Write every window of the job once; its number and what `Job.write` gave, in any order.

        Raises:
            InputError: it can't be run, or has ended before its last window.
        """
        ...
