"""Whatever a public function gives back that holds rows is a frame and shows itself in a notebook.

The classes are found by walking the front doors: a dataclass with a field of several of our own dataclasses, which a
public function returns. A new one has frames, or stands below with the reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import polars
import pyarrow as pa
import pytest

import qwen_scope
from qwen_scope import Intervention
from qwen_scope.analysis import Result, Rule, RuleFeature
from qwen_scope.circuits import Graph
from qwen_scope.circuits.graph import Ladder, Node
from qwen_scope.model import HookPoint
from qwen_scope.posttrain import AlphaTable, LayerTable, LoopShare
from qwen_scope.posttrain.loops import Answer
from qwen_scope.report import HasFrames, Table
from qwen_scope.sae import Identity
from qwen_scope.stats import Interval
from qwen_scope.steer import GeneratedToken, Generation, Recipe
from qwen_scope.text import Counted
from qwen_scope.train import EvalResult, Quality, Reconstruction, TrainResult

# Rooms whose results are pages and processes.
NO_RESULTS = ("cli", "explorer", "serve", "cluster")
SEVERAL = re.compile(r"\b(tuple|list|Sequence|[Mm]apping|dict)\[")

NO_TABLE = {
    "Curves": "what a figure draws",
    "Effects": "tensors of one forward and backward pass, which `Graph` tells",
    "Evidence": "what the one word of a verdict rests on",
    "Firings": "the input of an analysis",
    "Fit": "one verdict; EvalResult has a row for each",
    "LensReading": "a part of FeaturePage",
    "Material": "what a labeller is shown of one feature",
    "Probes": "fitted probes; a Scoreboard tells how they do",
    "Reading": "tensors of one prompt, which `Graph` tells",
    "Target": "a measure of texts",
    "Tokens": "token ids of a batch; TokenFeatures has the rows",
}


def front_doors() -> Iterator[tuple[str, object]]:
    """Every public name of every room whose results are data."""
    for room in pkgutil.iter_modules(qwen_scope.__path__):
        if room.ispkg and room.name not in (*NO_RESULTS, "assets"):
            door = importlib.import_module(f"qwen_scope.{room.name}")
            yield from ((name, getattr(door, name)) for name in dir(door) if not name.startswith("_"))


def walked() -> tuple[dict[str, type], set[str]]:
    """The public dataclasses by name, and every name that a public function or method says it returns."""
    classes: dict[str, type] = {}
    returned: set[str] = set()
    for _, found in front_doors():
        functions = [found]
        if inspect.isclass(found):
            if dataclasses.is_dataclass(found) or issubclass(found, HasFrames):
                classes[found.__name__] = found
            functions = [one for name, one in vars(found).items() if not name.startswith("_")]
        for one in functions:
            if inspect.isfunction(one) and one.__module__.startswith("qwen_scope"):
                returned |= set(re.findall(r"\w+", str(one.__annotations__.get("return"))))
    return classes, returned


CLASSES, RETURNED = walked()


def holds_rows(found: type) -> bool:
    """Whether a field holds several of our own dataclasses."""
    kinds = [str(field.type) for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
    return any(SEVERAL.search(kind) and CLASSES.keys() & set(re.findall(r"\w+", kind)) for kind in kinds)


def test_what_holds_rows_has_frames() -> None:
    rows = {name for name, found in CLASSES.items() if name in RETURNED and holds_rows(found)}
    assert len(rows) > 15
    bare = {name for name in rows if not issubclass(CLASSES[name], HasFrames)}
    assert sorted(bare - NO_TABLE.keys()) == []
    assert sorted(NO_TABLE.keys() - bare) == [], "an exception for a class that has none of this"


POINT = "layers.4.resid_post"
QUALITY = Quality(Reconstruction(10, 1, 0.2, 0.3, 0.8, 0.7, 0.9, 40.0, 0.0, (1, 2)), None)
TOKENS = (GeneratedToken(5, "<b>", 0.5), GeneratedToken(6, " x", None))
NODES = (
    Node("embedding", 0),
    Node("feature", 0, 4, 17, 2.0, 0.5, promotes=(" a", "<b>")),
    Node("target", 0, effect=3.0),
)

MADE: dict[type, Callable[[], HasFrames]] = {
    Result: lambda: Result({}, (Table("<b>", ("n",), [[1], [2]]),), (), ("a note",), "Half of them."),
    Rule: lambda: Rule("de", (RuleFeature(5, 678, 0.5, 2.0, 0.9, "f"), RuleFeature(5, 1, 0.1, 1.0, 0.2, "f"))),
    Graph: lambda: Graph(
        "m", "g", "a", ("a",), (5,), "logit of 'b'", 3.0, (6,), 0.5, "gradient", (4,), 6, NODES, (),
        (Ladder((1,), 4),), {}, {}, 0, 0.1, 0.8,
    ),
    Generation: lambda: Generation("a", "<b> x", TOKENS, True, ("a",)),
    Recipe: lambda: Recipe("<b>", "m", (Intervention.add(layer=5, feature=678, amount=0.3, unit="resid_norm"),)),
    TrainResult: lambda: TrainResult(Path("run"), {}, {POINT: QUALITY}),
    EvalResult: lambda: EvalResult("g", {HookPoint.parse(POINT): QUALITY}, {}, Counted(), 0),
    AlphaTable: lambda: AlphaTable(
        "de", (LayerTable(4, Identity("g", 4, "f"), (1, 2), (0.5, 0.4), {"de": (1.0, 2.0)}),)
    ),
    LoopShare: lambda: LoopShare(Interval(0.5, 0.2, 0.8, 2), 1.0, [Answer(0, "<b>", (1, 2), True, None)]),
}  # fmt: skip

ROWS = {
    Result: 2,
    Rule: 2,
    Graph: 1,
    Generation: 2,
    Recipe: 1,
    TrainResult: 1,
    EvalResult: 1,
    AlphaTable: 2,
    LoopShare: 1,
}


def test_each_class_with_frames_is_tried_somewhere() -> None:
    elsewhere = (Path(__file__).parent / "scope" / "test_in_a_notebook.py").read_text(encoding="utf-8")
    elsewhere += "TokenFeatures Comparisons Findings Matching"  # what its calls give back
    known = {found for found in CLASSES.values() if issubclass(found, HasFrames) and found is not HasFrames}
    missing = {found.__name__ for found in known - MADE.keys() if not re.search(rf"\b{found.__name__}\b", elsewhere)}
    assert sorted(missing) == []


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_frames_html_and_a_short_repr(kind: type) -> None:
    value = MADE[kind]()
    table = value.to_arrow()
    assert isinstance(table, pa.Table)
    assert table.num_rows == ROWS[kind]
    assert value.to_polars().equals(polars.from_arrow(table))
    assert len(value.to_pandas()) == ROWS[kind]
    html = value._repr_html_()
    assert "qwen-scope" in html
    assert "<b><b>" not in html, "markup of a text"
    assert "\n" not in repr(value)
    assert 0 < len(repr(value)) < 200
    assert repr(value).startswith(kind.__name__)
