"""Residuals of a real model, read once and kept on disk: the language model is most of what an SAE costs.

    python -m experiments.real.residuals FOLDER --model FOLDER --data FOLDER --layers 12 [--tokens N] [--held-out N]

`--data` holds `corpus/LANGUAGE.SOURCE.jsonl`; the documents of one language are taken, each text once. The folder then
holds, for the training documents and for held-out ones, one file per layer of bfloat16 numbers `(tokens, d_model)`
without sinks, first and special tokens. Documents are shuffled across sources. Training tokens are mixed within pieces
of `PASSES` passes; held-out ones stay in the order of the texts, so that an interval can be one over stretches of text.
It grows by whole pieces, so what was interrupted goes on from there.
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
TRAINING, HELD_OUT = "training", "held-out"


@dataclass(frozen=True)
class Residuals:
    """What is kept of one model, one folder of documents and some layers.

    Attributes:
        folder: where it is kept.   model: folder or name of the language model.
        data: a folder of documents, or what else `Corpus` takes.
        layers: from one forward pass, which stops after the deepest.
        sizes: tokens per layer, of `TRAINING` and `HELD_OUT`.
        passes: of the model in a piece.
    """

    folder: Path
    model: str
    data: str
    layers: tuple[int, ...]
    sizes: Mapping[str, int]
    passes: int = PASSES

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
        """Read what is missing; where nothing is, the folder may meanwhile be another process's to write to.

        Raises:
            InputError: the documents hold fewer tokens, or another process writes to the folder.
        """
        if all(self.have(part) >= wanted for part, wanted in self.sizes.items()):
            return
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
            for number, ids in enumerate(islice(stream, self.passes)):
                for point, h in capture(self.loaded.model, ids, self.points).items():
                    found[point.layer].append(h[self.counted.keep(h, point, ids)].to(torch.bfloat16))
                if number == min(4, self.passes) - 1 and not held["pieces"]:
                    left = (time.monotonic() - begun) * wanted / ((number + 1) * ROW * ROWS)
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
        """One piece of a layer behind those before it, that of training mixed, in the same way for every layer.

        Sinks differ between layers, so beyond the first one that a layer leaves out the tokens do too.
        """
        if part == TRAINING:
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000_003 + held["pieces"]))]
        with self.path(part, layer).open("ab") as file:
            x.view(torch.int16).numpy().tofile(file)
        held["tokens"][str(layer)] = held["tokens"].get(str(layer), 0) + len(x)


def distinct(data: Path, language: str, folder: Path) -> Path:
    """A folder with the documents of one language, each text once, so that no text is trained on and held out.

    Raises:
        InputError: there are no documents of this language.
    """
    seen, done = set(), folder / "whole"
    sources = sorted((data / "corpus").glob(f"{language}.*.jsonl"))
    if not sources:
        raise InputError(f"--data needs a folder corpus with documents; {data / 'corpus'} has no {language}.*.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for path in [] if done.is_file() else sources:
        kept = []
        for text in (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line):
            if text not in seen:
                seen.add(text)
                kept.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        write_text(folder / path.name, "".join(kept))
    write_text(done, "")
    return folder


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> tuple[int, ...]:
    """`6,12` as numbers, for an option."""
    return tuple(int(word) for word in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    """The capture alone."""
    import argparse

    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--model", required=True)
    ask.add_argument("--data", required=True, type=Path, help="a folder that holds corpus/LANGUAGE.SOURCE.jsonl")
    ask.add_argument("--language", default="en")
    ask.add_argument("--layers", type=numbers, required=True)
    ask.add_argument("--tokens", type=int, default=10_000_000)
    ask.add_argument("--held-out", type=int, default=1_000_000)
    given = ask.parse_args(arguments)
    sizes = {HELD_OUT: given.held_out, TRAINING: given.tokens}
    torch.set_num_threads(1)
    documents = distinct(given.data, given.language, given.folder / "documents")
    Residuals(given.folder, given.model, str(documents), given.layers, sizes).record()


if __name__ == "__main__":
    main()
