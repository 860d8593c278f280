"""Residuals of a real model, read once and kept on disk: the language model is most of what an SAE costs.

A folder of residuals holds, for the training documents and for held-out ones, one file per layer of bfloat16 numbers
`(tokens, d_model)` without sinks, first and special tokens, in an order that is mixed within pieces of `PIECE` tokens;
documents are shuffled across sources before. It grows by whole pieces, so what was interrupted goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.files import lock_folder, read_object, write_text
from qwen_scope.model import HookPoint, LoadedModel, capture, d_model, load_model, measure_counted
from qwen_scope.text import Corpus, Counted, TokenRows

ROW, ROWS, PASSES, HOLD_OUT, SHUFFLE = 256, 16, 64, 10, 1
PIECE = ROW * ROWS * PASSES
TRAINING, HELD_OUT = "training", "held-out"


@dataclass(frozen=True)
class Residuals:
    """What is kept of one model, one folder of documents and some layers.

    Attributes:
        folder: where it is kept.   model: folder or name of the language model.
        data: a folder of documents, or what else `Corpus` takes.
        layers: from one forward pass, which stops after the deepest.
        sizes: tokens per layer, of `TRAINING` and `HELD_OUT`.
    """

    folder: Path
    model: str
    data: str
    layers: tuple[int, ...]
    sizes: Mapping[str, int]

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.model, device="cpu", dtype="bfloat16")

    @property
    def points(self) -> list[HookPoint]:
        return [HookPoint(layer) for layer in self.layers]

    def rows(self, part: str) -> TokenRows:
        """The documents of a part in rows of tokens; every `HOLD_OUT`-th document is held out."""
        corpus = Corpus(self.data, hold_out=HOLD_OUT, held_out=part == HELD_OUT, shuffle=SHUFFLE, quiet=True)
        return TokenRows(corpus, self.loaded.tokenizer, context_length=ROW, batch_size=ROWS)

    @cached_property
    def counted(self) -> Counted:
        """Which tokens count, by thresholds for sinks that are measured once, on the first training rows."""
        path = self.folder / "counted.json"
        if not path.is_file():
            first = iter(self.rows(TRAINING))
            sample = chain([next(first)], first)
            found = measure_counted(self.loaded.model, self.loaded.tokenizer, sample, sample="the training documents")
            write_text(path, json.dumps(found.to_json()))
        return Counted.from_json(read_object(path))

    def path(self, part: str, layer: int) -> Path:
        return self.folder / f"{part}.layer{layer}.bf16"

    def held(self, part: str) -> dict[str, Any]:
        """How far a part has come: tokens by layer, where the documents are, pieces, and seconds they took."""
        path = self.folder / f"{part}.json"
        return read_object(path) if path.is_file() else {"tokens": {}, "cursor": None, "pieces": 0, "seconds": 0.0}

    def have(self, part: str) -> int:
        """Tokens that every layer has."""
        return min((int(n) for n in self.held(part)["tokens"].values()), default=0)

    def of(self, part: str, layer: int, tokens: int | None = None) -> Tensor:
        """The first residuals of a part, `(tokens, d_model)` in bfloat16, mapped from the disk.

        Raises:
            InputError: so many are not kept.
        """
        n = self.sizes[part] if tokens is None else tokens
        if self.have(part) < n:
            raise InputError(f"{self.folder} holds {self.have(part):,} {part} tokens of the {n:,} that are needed")
        path, width = self.path(part, layer), d_model(self.loaded.model)
        return torch.from_file(str(path), shared=False, size=n * width, dtype=torch.bfloat16).view(n, width)

    def record(self) -> None:
        """Read what is missing.

        Raises:
            InputError: the documents hold fewer tokens, or another process writes to the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder):
            for part, wanted in self.sizes.items():
                if self.have(part) < wanted:
                    self._record(part, wanted)

    @torch.inference_mode()
    def _record(self, part: str, wanted: int) -> None:
        held, rows = self.held(part), self.rows(part)
        if held["cursor"] is not None:
            rows.seek(held["cursor"])
        for layer in self.layers:  # what a kill left behind the last whole piece
            path = self.path(part, layer)
            path.touch()
            os.truncate(path, int(held["tokens"].get(str(layer), 0)) * d_model(self.loaded.model) * 2)
        stream, begun = iter(rows), time.monotonic()
        size = wanted * len(self.layers) * d_model(self.loaded.model) * 2
        while self.have(part) < wanted:
            found: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
            for number, ids in enumerate(islice(stream, PASSES)):
                for point, h in capture(self.loaded.model, ids, self.points).items():
                    found[point.layer].append(h[self.counted.keep(h, point, ids)].to(torch.bfloat16))
                if number == 3 and not held["pieces"]:
                    left = (time.monotonic() - begun) * wanted / (4 * ROW * ROWS)
                    say(f"{part}: {wanted:,} tokens will take about {left / 3600:.1f} hours and {size / 1e9:.1f} GB")
            if not any(found.values()):
                raise InputError(f"{self.data} holds {self.have(part):,} {part} tokens; {wanted:,} were asked for")
            for layer, parts in found.items():
                self._append(part, layer, torch.cat(parts), held)
            held["cursor"], held["pieces"] = rows.cursor(), held["pieces"] + 1
            now = time.monotonic()
            held["seconds"], begun = held["seconds"] + now - begun, now
            write_text(self.folder / f"{part}.json", json.dumps(held))
            say(f"{part}: {self.have(part):,} of {wanted:,} tokens, {held['seconds']:.0f} s")

    def _append(self, part: str, layer: int, x: Tensor, held: dict[str, Any]) -> None:
        """One piece of a layer behind those before it, in an order of its own; every layer's is the same.

        Sinks differ between layers, so beyond the first one that a layer leaves out the tokens do too.
        """
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000_003 + held["pieces"]))
        with self.path(part, layer).open("ab") as file:
            x[order].view(torch.int16).numpy().tofile(file)
        held["tokens"][str(layer)] = held["tokens"].get(str(layer), 0) + len(x)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> tuple[int, ...]:
    """`6,12` as numbers, for an option."""
    return tuple(int(word) for word in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m experiments.real.residuals FOLDER --model M --data D --layers 12`: the capture alone."""
    import argparse

    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--model", required=True)
    ask.add_argument("--data", required=True)
    ask.add_argument("--layers", type=numbers, required=True)
    ask.add_argument("--tokens", type=int, default=10_000_000)
    ask.add_argument("--held-out", type=int, default=1_000_000)
    given = ask.parse_args(arguments)
    sizes = {HELD_OUT: given.held_out, TRAINING: given.tokens}
    torch.set_num_threads(1)
    Residuals(given.folder, given.model, given.data, given.layers, sizes).record()


if __name__ == "__main__":
    main()
