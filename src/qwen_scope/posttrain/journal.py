"""A run that can be stopped at any time: rounds of attempts on disk, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from qwen_scope.errors import FormatError, InputError
from qwen_scope.files import read_lines, write_text

KEPT, SILENT, FIRING, EMPTY, DUPLICATE, FAILED = "kept", "silent", "firing", "empty", "duplicate", "failed"
OUTCOMES = (KEPT, SILENT, FIRING, EMPTY, DUPLICATE, FAILED)


@dataclass(frozen=True)
class Attempt:
    """One answer that was asked for.

    Attributes:
        layer, feature: of the target; -1 where there was none.
        attempt: the how-manieth for this target, from 1.
        outcome: `kept`; `silent`: the target does not fire; `firing`: it does and should not; `empty`: no text;
            `duplicate`: of the seed corpus or of a kept text; `failed`: no answer came.
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

    def seal(self, attempts: Sequence[Attempt]) -> None:
        """Write one more round."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self._path(len(self.rounds) + 1), [asdict(one) for one in attempts])
        self.rounds.append(list(attempts))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.jsonl"


def _read(path: Path) -> list[Attempt]:
    out = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            found = json.loads(line)
            fires = tuple((int(a), int(b), float(c)) for a, b, c in found.pop("fires"))
            out.append(Attempt(**found, fires=fires))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"line {number} of {path} is no attempt; delete this file and the later ones") from error
    return out


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_folder(out: Path, request: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than a run of the same request.

    Args:
        request: what decides the result, as plain data.

    Raises:
        InputError: it does.
    """
    path, asked = out / "run.json", json.loads(json.dumps(request))
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no record of a synthesis; name another folder") from error
        differ = [name for name in sorted({*before, *asked}) if before.get(name) != asked.get(name)]
        if differ:
            raise InputError(f"{out} holds a run with another {', '.join(differ)}; name another folder to begin anew")
    elif out.exists() and (
        not out.is_dir() or any(found.name not in ("seed", "cache", ".lock") for found in out.iterdir())
    ):
        raise InputError(f"{out} holds something else than a synthesis; name a new folder")
