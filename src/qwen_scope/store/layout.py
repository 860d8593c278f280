"""The store's layout: tables, encodings and manifest. `docs/store-format.md` says the same in words."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import FormatError, InputError, brief
from qwen_scope.files import parse_value
from qwen_scope.text import Counted

FORMAT, VERSION = "qwen-scope-store", 2
MANIFEST = "manifest.json"
WORK = "work"  # present only while a store is being written
MERGED = "merged"  # the key in a writer's state that says how many documents of shares are in the store

# A reader of one feature or one document decodes whole row groups, so they are small.
ROW_GROUP = 2**16
# Contexts take a few tokens from many places.
TOKEN_GROUP = 2**13
# Rows of one part of the `features` table.
PART_ROWS = 256 * ROW_GROUP

_int32, _int64, _text = pa.int32(), pa.int64(), pa.string()
_ACTIVATION = [
    ("layer", _int32),
    ("document", _int32),
    ("position", _int32),
    ("feature", _int32),
    ("value", pa.float32()),
]
TABLES: dict[str, pa.Schema] = {
    name: pa.schema([pa.field(column, kind, nullable=False) for column, kind in columns])
    for name, columns in {
        "documents": [
            ("document", _int32),
            ("first_token", _int64),
            ("tokens", _int32),
            ("cut", _int32),
            ("source", _text),
            ("row", _int64),
            ("meta", _text),
        ],
        "spans": [
            ("document", _int32),
            ("turn", _int32),
            ("role", _text),
            ("phase", _text),
            ("position", _int32),
            ("tokens", _int32),
        ],
        "tokens": [("document", _int32), ("position", _int32), ("token", _int32), ("text", _text)],
        "activations": _ACTIVATION,
        "features": _ACTIVATION,
        "stats": [
            ("layer", _int32),
            ("feature", _int32),
            ("tokens", _int64),
            ("documents", _int64),
            ("sum", pa.float64()),
            ("maximum", pa.float32()),
            ("minimum", pa.float32()),
            ("first_row", _int64),
        ],
        "masked": [("layer", _int32), ("document", _int32), ("position", _int32), ("reason", _text)],
        "unreadable": [("source", _text), ("row", _int64), ("reason", _text), ("detail", _text)],
        "residuals": [("layer", _int32), ("document", _int32), ("pooling", _text), ("vector", pa.list_(pa.float32()))],
    }.items()
}
PART_NAME = re.compile(rf"({'|'.join(TABLES)})/[0-9]{{6,}}\.parquet", re.ASCII)


def encoding(table: str) -> dict[str, Any]:
    """How pyarrow is to write the parts of a table."""
    numbers = {f.name: "DELTA_BINARY_PACKED" for f in TABLES[table] if f.type in (_int32, _int64)}
    floats = {f.name: "BYTE_STREAM_SPLIT" for f in TABLES[table] if pa.types.is_floating(f.type)}
    if table == "residuals":
        floats = {"vector.list.element": "BYTE_STREAM_SPLIT"}
    return {
        "version": "2.6",
        "data_page_version": "2.0",
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [f.name for f in TABLES[table] if f.type == _text],
        "column_encoding": {**numbers, **floats},
        "store_schema": False,
    }


def in_utf8(path: str | os.PathLike[str]) -> str:
    """A path in full, as DuckDB takes it: in UTF-8, whatever the locale reads.

    Raises:
        InputError: its bytes are no UTF-8.
    """
    whole = os.path.realpath(path)
    try:
        return os.fsencode(whole).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"DuckDB reads no folder whose name is not UTF-8: rename {whole}") from None


def part_name(table: str, number: int) -> str:
    """The name of a part inside the store, such as `tokens/000003.parquet`."""
    return f"{table}/{number:06d}.parquet"


@dataclass(frozen=True)
class Part:
    """One file of a table.

    Attributes:
        file: its name inside the store.   rows: how many rows.   bytes: how large.   sha256: of the whole file.
    """

    file: str
    rows: int
    bytes: int
    sha256: str

    @property
    def table(self) -> str:
        return self.file.split("/")[0]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a store, and the SAE that was used.

    Attributes:
        layer: counted from 0.   hook_point: such as `layers.2.resid_post`.
        group, fingerprint: the identity of the SAE.
        d_sae: its features.   k: features per token, None where it varies.   architecture: `topk` or `jumprelu`.
        tokens: how many tokens count: all but the masked ones.
        activations: how many rows this layer has in each of the two sort orders.
    """

    layer: int
    hook_point: str
    group: str
    fingerprint: str
    d_sae: int
    k: int | None
    architecture: str
    tokens: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a store holds. It is written last: a folder without one is not a store.

    Attributes:
        model: the source of the language model.
        request: the options of the extraction.
        layers: by layer.
        documents, tokens: how many, masked tokens counted.
        unreadable: how many rows of the corpus could not be used, by reason.
        parts: every file, in the order of its table.
        versions: of the packages that wrote it.
        sources: where the `model` and the `saes` lay: `name` of the catalog or the Hub, or `path` and `relative`, the
            way from the store. Empty in a store of an earlier writer.
    """

    model: str
    request: dict[str, Any]
    layers: dict[int, LayerInfo]
    documents: int
    tokens: int
    unreadable: dict[str, int]
    parts: tuple[Part, ...]
    versions: dict[str, str]
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def counted(self) -> Counted | None:
        """Which tokens count, as the request says; None where it does not say it.

        Of a store of version 1 this has the thresholds for sinks; the special ids it left out stand in `masked` alone.

        Raises:
            FormatError: the request is of another type there.
        """
        data = self.request.get("counted")
        return None if data is None else Counted.from_json(data, f"'counted' in {MANIFEST}")

    def to_json(self) -> str:
        """The text of manifest.json."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "layers": [asdict(info) for _, info in sorted(self.layers.items())],
        }
        if not self.sources:
            del data["sources"]
        return json.dumps(data, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            FormatError: it is no JSON, of another format or of a later version, or a value does not fit.
        """
        data = parse_value(text, MANIFEST)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(f"{MANIFEST} does not say it is of the format {FORMAT!r}")
        version = data.get("version")
        if type(version) is not int or version not in (1, VERSION):
            raise FormatError(f"the store is of version {brief(version)} and this package reads 1 and {VERSION}")
        body = {key: value for key, value in data.items() if key not in ("format", "version")}
        known = {f.name for f in fields(cls)}
        body.setdefault("sources", {})
        if set(body) != known:
            odd = ", ".join(sorted(set(body) ^ known))
            raise FormatError(f"{MANIFEST} lacks or adds {odd}; it has exactly {', '.join(sorted(known))}")
        _check(
            body, {"model": str, "request": dict, "layers": list, "unreadable": dict, "parts": list, "versions": dict}
        )
        _check(body, {"documents": int, "tokens": int})
        if version == 1:
            body |= _from_version_1(body)
        layers = [_read(LayerInfo, entry) for entry in body["layers"]]
        parts = tuple(_read(Part, entry) for entry in body["parts"])
        if len({info.layer for info in layers}) != len(layers) or len({part.file for part in parts}) != len(parts):
            raise FormatError(f"{MANIFEST} names a layer or a part twice")
        for part in parts:
            if not PART_NAME.fullmatch(part.file):
                raise FormatError(f"{MANIFEST} names the part {part.file!r}, which is not a name of this format")
        _check(body, {"sources": dict})
        for name, place in body["sources"].items():
            _check({name: place}, {name: dict})
            _check(place, dict.fromkeys(place, str))
        for reason, count in body["unreadable"].items():
            _check({reason: count}, {reason: int})
        made = cls(**{**body, "layers": {info.layer: info for info in layers}, "parts": parts})
        _ = made.counted  # refused here rather than where it is first used
        return made


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Layers and request as this version has them: a sink was longer than a multiple of its layer's median norm."""
    layers, norms, multiple = [], {}, body["request"].get("sink_multiple")
    for entry in body["layers"]:
        if not isinstance(entry, dict) or "median_norm" not in entry:
            raise FormatError(f"an entry of 'layers' in {MANIFEST} lacks median_norm, which version 1 has")
        _check(entry, {"median_norm": (float, int, type(None))})
        median = entry["median_norm"]
        if median and isinstance(multiple, int | float) and not isinstance(multiple, bool):
            norms[entry.get("hook_point")] = float(multiple * median)
        layers.append({key: value for key, value in entry.items() if key != "median_norm"})
    try:
        counted = Counted(first=0, norms=norms, sample="the first window" if norms else "")
    except InputError as error:
        raise FormatError(f"the thresholds for sinks in {MANIFEST} do not fit: {error}") from error
    return {"layers": layers, "request": {**body["request"], "counted": counted.to_json()}}


_KINDS: dict[str, Any] = {
    "int": int,
    "str": str,
    "int | None": (int, type(None)),
}


def _read(kind: type[Any], entry: Any) -> Any:
    """One entry of a list in the manifest as its dataclass."""
    wanted = {f.name: _KINDS[str(f.type)] for f in fields(kind)}
    if not isinstance(entry, dict) or set(entry) != set(wanted):
        raise FormatError(f"an entry of {MANIFEST} has exactly the keys {', '.join(wanted)}")
    _check(entry, wanted)
    return kind(**entry)


def _check(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, kind in kinds.items():
        value = data[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"{key!r} in {MANIFEST} holds {brief(value)}, which does not fit")
        if isinstance(value, int | float) and not 0 <= value < 2**63:
            raise FormatError(f"{key!r} in {MANIFEST} is {value}, which is no count")


def part_writer(path: str, table: str) -> pq.ParquetWriter:
    """A Parquet writer for one part."""
    return pq.ParquetWriter(path, TABLES[table], **encoding(table))
