"""A run that can be stopped at any time: rounds of attempts on disk, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

from qwen_scope.errors import FormatError, InputError, brief
from qwen_scope.files import Fields, parse_object, read_lines, read_object, write_text

KEPT, SILENT, FIRING, EMPTY, COPIED = "kept", "silent", "firing", "empty", "copied"
DUPLICATE, FAILED = "duplicate", "failed"
OUTCOMES = (KEPT, SILENT, FIRING, EMPTY, COPIED, DUPLICATE, FAILED)


@dataclass(frozen=True)
class Attempt:
    """One answer that was asked for.

    Attributes:
        layer, feature: of the target; -1 where there was none.
        attempt: the how-manieth for this target, from 1.
        outcome: `kept`; `silent`: the target does not fire; `firing`: it does and should not; `empty`: no text;
            `copied`: nearly all of it stands in the question, such as an excerpt with its marks; `duplicate`: of the
            seed corpus or of a kept text; `failed`: no answer came.
        text: the answer.
        activation: the target's largest activation in it.
        fires: layer, feature and largest activation of every target that fires in a kept text.
        problem: why it failed.
        of: for a rewritten text, the text it was made from.
    """

    layer: int
    feature: int
    attempt: int
    outcome: str
    text: str = ""
    activation: float = 0.0
    fires: tuple[tuple[int, int, float], ...] = ()
    problem: str = ""
    of: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """Layer and feature."""
        return self.layer, self.feature


KEYS = tuple(field.name for field in fields(Attempt))


@final
class Journal:
    """The finished rounds of a run, in a folder of files with a line of JSON per attempt.

    Raises:
        FormatError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds: list[list[Attempt]] = []
        while (path := self._path(len(self.rounds) + 1)).is_file():
            self.rounds.append(_read(path))

    def seal(self, number: int, attempts: Sequence[Attempt]) -> None:
        """Write round `number`, counted from 0: one more, or in the place of one that was torn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self._path(number + 1), [asdict(one) for one in attempts])
        self.rounds[number : number + 1] = [list(attempts)]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.jsonl"


def _read(path: Path) -> list[Attempt]:
    """The attempts of a round; those of a torn last line are missing."""
    out = []
    for number, line in enumerate(read_lines(path), 1):
        what = f"line {number} of {path}"
        try:
            out.append(_attempt(Fields(parse_object(line, what), what, KEYS)))
        except FormatError as error:
            raise FormatError(f"{error}; delete this file and the later ones") from error
    return out


def _attempt(read: Fields) -> Attempt:
    fires = []
    for one in read.items("fires"):
        if not isinstance(one, list) or len(one) != 3:
            raise FormatError(f"{read.what} names a firing target by layer, feature and activation, not {brief(one)}")
        part = Fields(
            dict(zip(("layer", "feature", "activation"), one, strict=True)), f"a firing target in {read.what}"
        )
        fires.append((part.count("layer"), part.count("feature"), part.number("activation")))
    if read.text("outcome") not in OUTCOMES:
        raise FormatError(f"{read.what} has no outcome {brief(read['outcome'])}; there are {', '.join(OUTCOMES)}")
    return Attempt(
        read.count("layer", -1),
        read.count("feature", -1),
        read.count("attempt", 1),
        read.text("outcome"),
        read.text("text"),
        read.number("activation"),
        tuple(fires),
        read.text("problem"),
        read.text("of"),
    )


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_folder(out: Path, request: Mapping[str, Any]) -> None:
    """Refuse a folder with anything but a run of the same request.

    Args:
        request: what decides the result, as plain data.

    Raises:
        InputError: it does.
    """
    path, asked = out / "run.json", json.loads(json.dumps(request))
    if path.is_file():
        try:
            before = Fields(read_object(path), str(path)).object("request")
        except FormatError as error:
            raise InputError(f"{path} is no record of a synthesis ({error}); name another folder") from error
        differ = [name for name in sorted({*before, *asked}) if before.get(name) != asked.get(name)]
        if differ:
            raise InputError(f"{out} holds a run with another {', '.join(differ)}; name another folder to begin anew")
    elif out.exists() and (
        not out.is_dir() or any(found.name not in ("seed", "cache", ".lock") for found in out.iterdir())
    ):
        raise InputError(f"{out} contains something other than a synthesis; name a new folder")
