"""Hostile stores: each is refused with one sentence when it is opened or asked, and nothing outside it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_scope.errors import FormatError, QwenScopeError
from qwen_scope.store import FeatureStore, LayerInfo, LayerRows, StoreWriter, Window
from qwen_scope.store.layout import TABLES, part_writer

D_SAE, TOKENS = 24, 50


def good(folder: Path) -> Path:
    """A small store, made without a model."""
    document, position = np.repeat(np.arange(5, dtype=np.int32), 10), np.tile(np.arange(10, dtype=np.int32), 5)
    feature = (np.arange(TOKENS, dtype=np.int32) * 7) % D_SAE
    value = np.linspace(1, 2, TOKENS, dtype=np.float32)
    tables = {
        "documents": [
            {"document": i, "first_token": 10 * i, "tokens": 10, "cut": 0, "source": "x", "row": i, "meta": "{}"}
            for i in range(5)
        ],
        "tokens": [
            {"document": int(d), "position": int(p), "token": 1, "text": "<b>\u202e\x00"}
            for d, p in zip(document, position, strict=True)
        ],
    }
    made = {name: pa.Table.from_pylist(tables.get(name, []), schema=TABLES[name]) for name in TABLES}
    made = {name: made[name] for name in ("documents", "tokens", "masked", "unreadable", "residuals")}
    info = LayerInfo(3, "layers.3.resid_post", "group", "f" * 64, D_SAE, 1, "topk")
    with StoreWriter(folder, "model", {"row_tokens": 10}, [info]) as writer:
        writer.add(Window({3: LayerRows(document, position, feature, value, TOKENS)}, made), {})
        writer.finish()
    return folder


def manifest(folder: Path, **changes: Any) -> None:
    """Change keys of the manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def layer(folder: Path, **changes: Any) -> None:
    """Change keys of its one layer."""
    entry = json.loads((folder / "manifest.json").read_text())["layers"][0]
    manifest(folder, layers=[{**entry, **changes}])


def part(folder: Path, name: str, **changes: Any) -> None:
    """Change the manifest's entry of a part."""
    entries = json.loads((folder / "manifest.json").read_text())["parts"]
    manifest(folder, parts=[{**entry, **changes} if entry["file"] == name else entry for entry in entries])


def rewrite(folder: Path, table: str, column: str, at: int, value: Any) -> None:
    """Change one cell, and the manifest to fit the new part."""
    name = f"{table}/000000.parquet"
    rows = pq.read_table(folder / name).to_pylist()
    rows[at][column] = value
    with part_writer(str(folder / name), table) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=TABLES[table]))
    part(folder, name, bytes=(folder / name).stat().st_size)


def linked(folder: Path) -> None:
    """A part that is a link to somewhere else."""
    shutil.move(folder / "tokens" / "000000.parquet", folder.parent / "elsewhere.parquet")
    (folder / "tokens" / "000000.parquet").symlink_to(folder.parent / "elsewhere.parquet")


def linked_table(folder: Path) -> None:
    """A whole table that is a link to somewhere else."""
    shutil.move(folder / "tokens", folder.parent / "elsewhere")
    (folder / "tokens").symlink_to(folder.parent / "elsewhere")


def cut(folder: Path, name: str, honest: bool) -> None:
    """A part without its end; an honest manifest knows its size."""
    data = (folder / name).read_bytes()[:-20]
    (folder / name).write_bytes(data)
    if honest:
        part(folder, name, bytes=len(data))


def other_columns(folder: Path) -> None:
    """A part of another table under this name."""
    shutil.copy(folder / "documents" / "000000.parquet", folder / "tokens" / "000000.parquet")
    part(folder, "tokens/000000.parquet", bytes=(folder / "tokens" / "000000.parquet").stat().st_size)


FEATURES = "features/000000.parquet"
ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: it is no store"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
    "too deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "is not JSON"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xff"), "is not UTF-8"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "does not say it is of the format"),
    "another format": (lambda f: manifest(f, format="zarr"), "does not say it is of the format"),
    "a future version": (lambda f: manifest(f, version=3), "of version 3 and this package reads 1 and 2"),
    "version true": (lambda f: manifest(f, version=True), "of version True"),
    "an unknown key": (lambda f: manifest(f, extra=1), "lacks or adds extra"),
    "documents as text": (lambda f: manifest(f, documents="5"), "'documents' .* does not fit"),
    "negative documents": (lambda f: manifest(f, documents=-5), "'documents' .* is no count"),
    "infinite tokens": (lambda f: manifest(f, tokens=1e400), "does not fit"),
    "fewer documents": (lambda f: manifest(f, documents=4), r"a document of 4; it must be in \[0, 4\)"),
    "more documents": (lambda f: manifest(f, documents=6), "5 rows of 'documents' and its manifest says 6"),
    "another number of tokens": (lambda f: manifest(f, tokens=51), "50 rows of 'tokens' .* says 51"),
    "a narrower SAE": (lambda f: layer(f, d_sae=D_SAE - 1), rf"a feature of 23; it must be in \[0, {D_SAE - 1}\)"),
    "a wider SAE": (lambda f: layer(f, d_sae=D_SAE + 1), "24 rows of 'stats' and its manifest says 25"),
    "another layer": (lambda f: layer(f, layer=4), "layers 3 to 3, which the manifest does not have"),
    "fewer activations": (lambda f: layer(f, activations=1), "50 rows of 'activations' and its manifest says 1"),
    "a layer without a name": (lambda f: manifest(f, layers=[{"layer": 3}]), "has exactly the keys"),
    "no layers": (lambda f: manifest(f, layers=[]), "which the manifest does not have"),
    "a part missing": (lambda f: (f / FEATURES).unlink(), "lacks its part"),
    "a part not listed": (lambda f: manifest(f, parts=[]), "0 rows of 'documents'"),
    "a part cut off": (lambda f: cut(f, FEATURES, False), "was cut off or changed"),
    "a part cut off, honestly": (lambda f: cut(f, FEATURES, True), "is not a whole Parquet file"),
    "a part with other rows": (lambda f: part(f, FEATURES, rows=49), "50 rows and the manifest says 49"),
    "a part of another table": (other_columns, "has not the columns of the table 'tokens'"),
    "a path upwards": (lambda f: part(f, FEATURES, file="../../etc/passwd"), "is not a name of this format"),
    "an absolute path": (lambda f: part(f, FEATURES, file="/etc/passwd"), "is not a name of this format"),
    "a path in disguise": (lambda f: part(f, FEATURES, file="features/000000.parquet\n"), "is not a name of"),
    "a glob": (lambda f: part(f, FEATURES, file="features/*.parquet"), "is not a name of this format"),
    "a part twice": (lambda f: part(f, FEATURES, file="tokens/000000.parquet"), "names a layer or a part twice"),
    "a link": (linked, "is a link or no plain file"),
    "a table that is a link": (linked_table, "is a link or no plain file"),
    "a negative feature": (lambda f: rewrite(f, "activations", "feature", 3, -1), "a feature of -1; it must be in"),
    "a feature beyond": (lambda f: rewrite(f, "features", "feature", 3, D_SAE), "a feature of 24; it must be in"),
    "a negative position": (lambda f: rewrite(f, "activations", "position", 3, -1), "a position of -1"),
    "a document beyond": (lambda f: rewrite(f, "features", "document", 3, 5), r"a document of 5; it must be in \[0, 5"),
    "a negative value": (lambda f: rewrite(f, "features", "value", 3, -1.0), "a value of -1.0; activations are"),
    "a zero": (lambda f: rewrite(f, "activations", "value", 3, 0.0), "a value of .*0.0; activations are"),
    "an infinite value": (lambda f: rewrite(f, "features", "value", 3, float("inf")), "a value of inf"),
}
# These show when the store is asked, not when it is opened.
LATE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "stats that point beyond": (
        lambda f: rewrite(f, "stats", "first_row", 3, 10**12),
        "has 50 rows, not rows 1000000000000 to",
    ),
    "stats with negative rows": (lambda f: rewrite(f, "stats", "tokens", 3, -2), "has 50 rows, not rows"),
    "stats out of order": (lambda f: rewrite(f, "stats", "feature", 3, 4), "are not in order at layer 3, feature 3"),
    "documents that point beyond": (
        lambda f: [rewrite(f, "documents", "first_token", i, 10**9) for i in range(5)],
        "rows",
    ),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good(tmp_path_factory.mktemp("hostile") / "s")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "s")
    return tmp_path / "s"


def ask(folder: Path) -> None:
    """Open the store and look at a feature."""
    with FeatureStore(folder) as store:
        for feature in range(5):
            store.contexts(3, feature)


def refused(folder: Path, sentence: str) -> None:
    """One sentence, of the right length, on one line."""
    with pytest.raises(QwenScopeError, match=sentence) as caught:
        ask(folder)
    assert "\n" not in str(caught.value)
    assert 10 < len(str(caught.value)) < 500


def test_the_good_one_opens_and_its_text_is_kept_as_it_is(folder: Path) -> None:
    ask(folder)
    (folder / "tokens" / "junk.parquet").write_text("not listed, so not read")
    with FeatureStore(folder) as store:
        store.verify()
        assert store.contexts(3, 0)[0].tokens[0] == "<b>\u202e\x00"


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_on_opening(folder: Path, attack: str) -> None:
    change, sentence = ATTACKS[attack]
    change(folder)
    refused(folder, sentence)
    with pytest.raises(QwenScopeError):
        FeatureStore(folder)


@pytest.mark.parametrize("attack", LATE)
def test_refused_when_asked(folder: Path, attack: str) -> None:
    change, sentence = LATE[attack]
    change(folder)
    refused(folder, sentence)


def test_bytes_changed_inside_a_part(folder: Path) -> None:
    """The size still fits, so it opens; `verify` finds it."""
    path = folder / FEATURES
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(bytes(data))
    with FeatureStore(folder) as store, pytest.raises(FormatError, match="has changed since it was written"):
        store.verify()
    refused(folder, "is damaged")
