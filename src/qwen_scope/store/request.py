"""What a store was asked for: in which options two requests differ, and where the model and the SAEs lay."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError, NotFoundError, QwenScopeError, brief
from qwen_scope.files import Remote, place, read_object
from qwen_scope.sae import catalog, load_sae
from qwen_scope.text import Counted

from .layout import MANIFEST, WORK, Manifest

SHOWN = 40  # characters of two long values around the place where they part


def kept_counted(folder: str | os.PathLike[str]) -> Counted | None:
    """Which tokens count in a store that was begun or finished in a folder, where that was measured; else None.

    A run that goes on, or asks for a store that is there, takes it from here instead of measuring it again.
    """
    there = place(folder)
    path = there / MANIFEST
    if not path.is_file():
        path = there / WORK / "request.json"
        windows = (there / WORK).glob("window-*.json")
        if not path.is_file() or not any(read_object(one).get("tokens") for one in windows):
            return None
    request = read_object(path).get("request")
    if not isinstance(request, Mapping) or request.get("counted_by") != "measured":
        return None
    return Counted.from_json(request.get("counted"), f"'counted' in {path}")


def check_same(old: Any, new: Mapping[str, Any], folder: Path | Remote) -> None:
    """Refuse to go on with another request than a folder was begun with.

    Raises:
        InputError: it names every option that differs, with both values.
    """
    if said := "; ".join(differences(old, new)):
        raise InputError(f"{folder} was begun with other options ({said}); repeat them or name a new folder")


def differences(old: Any, new: Mapping[str, Any]) -> Iterator[str]:
    """Each option in which two requests differ, as `NAME was A, now B`."""
    before, now = _flat(old), _flat(new)
    for name in sorted(set(before) | set(now)):
        if (name in before) != (name in now) and " of " in name:
            continue  # of a source or a layer that only one of them has
        a, b = before.get(name), now.get(name)
        if a == b or (name == "model" and _one_place(a, b)):
            continue
        yield f"{name} was {_shown(a, b)}, now {_shown(b, a)}"


def _flat(data: Any) -> dict[str, Any]:
    """Every option by its own name: of extraction and corpus, the size of each source, the SAE of each layer."""
    request = dict(data["request"])
    corpus = request.pop("corpus", {})
    corpus = dict(corpus) if isinstance(corpus, Mapping) else {"corpus": corpus}
    sources = corpus.pop("sources", [])
    out = {"model": data["model"], **request, **corpus}
    out["corpus"] = [name for name, _ in sources]
    out |= {f"the size of {name}": size for name, size in sources}
    out["layers"] = [info["layer"] for info in data["layers"]]
    for info in data["layers"]:
        out |= {f"{key} of layer {info['layer']}": value for key, value in info.items() if key != "layer"}
    return out


def _shown(value: Any, other: Any) -> str:
    """A value in a few words, from shortly before the place where it parts from the other."""
    mine, theirs = repr(value), repr(other)
    if brief(value) != brief(other):
        return brief(value)
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    start = max(0, at - SHOWN // 2)
    return ("…" if start else "") + mine[start : start + 2 * SHOWN] + ("…" if start + 2 * SHOWN < len(mine) else "")


def _one_place(a: Any, b: Any) -> bool:
    """Whether two names of a model mean the same folder."""
    return isinstance(a, str) and isinstance(b, str) and _is_folder(a) and _is_folder(b) and os.path.samefile(a, b)


def _is_folder(source: str) -> bool:
    return catalog.lookup(source) is None and os.path.exists(os.path.expanduser(source))


def place_of(source: str, store: str | os.PathLike[str]) -> dict[str, str]:
    """Where a model or SAEs lie, so that they are found again from anywhere: `name` (of the catalog or the Hub), or
    `path` and `relative`, the way there from the store, if that is on this machine."""
    if not _is_folder(source):
        return {"name": source}
    path = os.path.realpath(os.path.expanduser(source))
    out = {"path": path}
    here = place(store)
    if isinstance(here, Remote):
        return out
    if os.path.splitdrive(path)[0] == os.path.splitdrive(os.path.realpath(here))[0]:
        out["relative"] = Path(os.path.relpath(path, os.path.realpath(here))).as_posix()
    return out


def source_of(manifest: Manifest, folder: Path | Remote, what: str) -> str | None:
    """The name or the folder of a store's `model` or `saes`, or None where the store does not say.

    A folder is looked for beside the store first, then where it was; where both are there, the SAEs' weights decide.

    Raises:
        NotFoundError: it has moved.
    """
    lay = manifest.sources.get(what)
    if lay is None or "name" in lay:
        return (lay or {}).get("name")
    beside = folder.resolve() / lay["relative"] if isinstance(folder, Path) and "relative" in lay else None
    known = [Path(os.path.realpath(path)) for path in (beside, lay.get("path")) if path and os.path.exists(path)]
    if not known:
        said, option = ("SAEs", "--sae") if what == "saes" else ("model", "--model")
        raise NotFoundError(
            f"the {said} of {folder} lay in {lay.get('path')}, where nothing is now; say where with {option} FOLDER"
        )
    if what == "saes" and len(set(known)) > 1:
        info = next(iter(manifest.layers.values()))
        known.sort(key=lambda path: _fingerprint(path, info.layer) != info.fingerprint)
    return str(known[0])


def _fingerprint(path: Path, layer: int) -> str | None:
    try:
        return load_sae(path, layer).identity.fingerprint
    except QwenScopeError:
        return None
