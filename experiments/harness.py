"""One harness for all experiments.

An experiment says which factors it varies, has one function that runs one cell (one level of each factor: a condition,
a language, a seed) and one function that writes its section of docs/results.md from the cells. The harness gives it a
command line:

    python -m experiments.lab.NAME [--conditions a,b] [--seeds 1,2] [--keep FOLDER] [--quick] [--write]

A finished cell is a line of `runs.jsonl` in the kept folder, so an interrupted run continues where it stopped.
`config.json` beside it holds the settings and versions; cells with other settings are not mixed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.sections import write_section
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.files import append_lines, digest_of, lock_folder, read_lines, read_object, write_text

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "src" / "qwen_scope" / "assets" / "lab" / "metrics.json"
PACKAGES = ("qwen-scope", "torch", "transformers", "trl", "numpy", "scipy", "scikit-learn")
S = TypeVar("S")
Row = dict[str, Any]


@dataclass(frozen=True)
class At(Generic[S]):
    """What a run was started with.

    Attributes:
        sizes: numbers of prompts, texts and steps.
        levels: the chosen levels of each factor.
        options: the experiment's own options.
        folder: where finished cells, and what cells share, are kept.
    """

    sizes: S
    levels: Mapping[str, tuple[Any, ...]]
    options: Mapping[str, Any]
    folder: Path

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, as JSON; made once and kept in the folder."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(make(), default=_plain))
        return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """One experiment.

    Attributes:
        title: of its section.
        varies: the default levels of each factor, the outermost first. Numbers may be others on the command line;
            words have to be among these; without default levels any word will do.
        run: `run(at, **cell)` runs one cell and returns a JSON object.
        tell: `tell(at, rows)` gives the section's body; a row holds a cell and what `run` returned for it.
        sizes: the sizes that --quick makes smaller.
        quick: levels for --quick.
        quick_sizes: sizes for --quick.
        takes: which cells of the product are run.
        options: further options, as `add_argument` takes them.
        variant: what sets the section of other options apart: it is called `title: variant`.
    """

    title: str
    varies: Mapping[str, Sequence[Any]]
    run: Callable[..., Mapping[str, Any]]
    tell: Callable[[At[S], list[Row]], str]
    sizes: S
    quick: Mapping[str, Sequence[Any]]
    quick_sizes: S
    takes: Callable[..., bool] = lambda **cell: True
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variant: Callable[[At[S]], str] = lambda at: ""

    def cells(self, at: At[S]) -> Iterator[dict[str, Any]]:
        """The cells to run, in order."""
        for levels in product(*at.levels.values()):
            cell = dict(zip(at.levels, levels, strict=True))
            if self.takes(**cell):
                yield cell


def main(experiment: Experiment[Any], arguments: Sequence[str] | None = None) -> None:
    """The command line of an experiment."""
    ask = _parser(experiment)
    given = ask.parse_args(arguments)
    if given.quick and given.write:
        ask.error("--quick is for trying out: its figures do not belong on the page; leave out --quick or --write")
    try:
        at = _resolve(experiment, given)
        rows = run_all(experiment, at)
        body = experiment.tell(at, rows)
    except QwenScopeError as error:
        ask.exit(2, f"{error}\n")
    print(body)
    if given.write:
        variant = experiment.variant(at)
        write_section(f"{experiment.title}: {variant}" if variant else experiment.title, body)


def run_all(experiment: Experiment[Any], at: At[Any]) -> list[Row]:
    """Run the cells that the folder lacks; the rows of all that were asked for.

    Raises:
        InputError: the folder holds cells with other settings, or another process writes to it.
    """
    with lock_folder(at.folder):
        _check_config(experiment, at)
        path = at.folder / "runs.jsonl"
        found = {}
        for line in read_lines(path):  # a line that was torn by a kill is left out, and its cell runs again
            one = json.loads(line)
            found[_key(one["cell"])] = one["result"]
        rows = []
        for cell in experiment.cells(at):
            if _key(cell) not in found:
                begun = time.monotonic()
                result = json.loads(json.dumps(dict(experiment.run(at, **cell)), default=_plain))
                seconds = round(time.monotonic() - begun, 2)
                line = json.dumps({"cell": cell, "result": result, "seconds": seconds}, ensure_ascii=False)
                append_lines(path, [line])
                print(f"{', '.join(map(str, cell.values()))}: {seconds:.0f} s", file=sys.stderr, flush=True)
                found[_key(cell)] = result
            rows.append({**cell, **found[_key(cell)]})
    return rows


def _parser(experiment: Experiment[Any]) -> argparse.ArgumentParser:
    text = sys.modules[experiment.run.__module__].__doc__
    ask = argparse.ArgumentParser(
        prog=f"python -m {_module(experiment)}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for factor, levels in experiment.varies.items():
        default = f"default: {','.join(map(str, levels))}" if levels else "required"
        ask.add_argument(f"--{factor}s", metavar="A,B", help=default, required=not levels)
    for name, settings in experiment.options.items():
        ask.add_argument(f"--{name}", **settings)
    ask.add_argument("--keep", type=Path, help="the folder of finished cells; default: out/experiments/NAME")
    ask.add_argument("--quick", action="store_true", help="few cells of small sizes, to see that it runs")
    ask.add_argument("--write", action="store_true", help="write the section of docs/results.md")
    return ask


def _resolve(experiment: Experiment[Any], given: argparse.Namespace) -> At[Any]:
    levels = {}
    for factor, default in experiment.varies.items():
        text = getattr(given, f"{factor}s")
        chosen = experiment.quick.get(factor, default) if given.quick else default
        levels[factor] = tuple(chosen) if text is None else _levels(factor, text, default)
    options = {name: getattr(given, name.replace("-", "_")) for name in experiment.options}
    sizes = experiment.quick_sizes if given.quick else experiment.sizes
    variant = experiment.variant(At(sizes, levels, options, Path()))
    name = "-".join([_module(experiment).rpartition(".")[2], *variant.split(), *(["quick"] if given.quick else [])])
    return At(sizes, levels, options, given.keep or ROOT / "out" / "experiments" / name)


def _levels(factor: str, text: str, default: Sequence[Any]) -> tuple[Any, ...]:
    """Levels as typed: words, numbers, and ranges of whole numbers such as 20-39."""
    kind = type(default[0]) if default else str
    out: list[Any] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        try:
            out += range(int(first), int(last) + 1) if kind is int and last else [kind(word)]
        except ValueError as error:
            raise InputError(f"--{factor}s takes numbers with commas between them, not {word!r}") from error
    unknown = [level for level in out if kind is str and default and level not in default]
    if unknown or not out:
        raise InputError(f"--{factor}s are among {', '.join(map(str, default))}; not {', '.join(unknown) or 'none'}")
    return tuple(out)


def _check_config(experiment: Experiment[Any], at: At[Any]) -> None:
    """Write the settings of a new folder; refuse a folder of others."""
    path = at.folder / "config.json"
    module = sys.modules[experiment.run.__module__]
    constants = {  # numbers and lists of the script; its prose may change
        name: value for name, value in vars(module).items() if name.isupper() and not isinstance(value, str | Path)
    }
    now = {
        "experiment": _module(experiment),
        "sizes": at.sizes,
        "options": at.options,
        "constants": constants,
        "lab": digest_of(METRICS)[:12],
    }
    now = json.loads(json.dumps(now, default=_plain))
    if path.is_file():
        before = read_object(path)
        other = [f"{part} {_difference(before.get(part), now[part])}" for part in now if before.get(part) != now[part]]
        if other:
            raise InputError(
                f"{at.folder} holds cells of other settings ({'; '.join(other)}); name another with --keep"
            )
        return
    config = {**now, "levels": at.levels, "versions": _versions()}
    write_text(path, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in names)
    return f"{before}, now {now}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _module(experiment: Experiment[Any]) -> str:
    file = Path(sys.modules[experiment.run.__module__].__file__ or "")
    return f"experiments.{file.parent.name}.{file.stem}"


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON does not know: dataclasses, sets, arrays, paths, patterns."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    listed = getattr(value, "tolist", None)
    return listed() if callable(listed) else str(value)
