"""`qwen-scope analyze`: one command for every entry of `ANALYSES`, made from its function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import typer

from qwen_scope.errors import InputError

from . import names, options, output, tables
from .commands import App, Group

if TYPE_CHECKING:
    from qwen_scope.analysis import Analysis, Dataset, Result

OUT = "Folder for report.html, figures and items.csv and .parquet; or one .csv, .parquet or .json file of the items."
REDUCTIONS = ("any", "last", "mean", "max")
REDUCTION_HELP = "Tokens of an item to one value: any, last, mean or max."


def shared(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders that extract has written.")],
    layer: Annotated[int | None, typer.Option("--layer", help="Which layer. Default: the only one.")] = None,
    reduction: Annotated[str | None, typer.Option("--reduction", help=REDUCTION_HELP)] = None,
    phase: options.Phase = None,
    names: Annotated[
        str | None, typer.Option("--names", help="What to call the stores, a,b,... Default: their folders.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="A CSV of model scores per store, in order: id,MODEL,...")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=OUT)] = None,
    as_json: options.Json = False,
) -> None:
    """The options that every analysis has."""


class Analyses(Group):
    """Finds its commands in `ANALYSES`, and only when one is asked for: `--help` elsewhere stays instant."""

    def list_commands(self, ctx: Any) -> list[str]:
        from qwen_scope.analysis import ANALYSES

        return list(ANALYSES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from qwen_scope.analysis import ANALYSES

        if cmd_name not in ANALYSES:
            return None
        one = App()
        one.command(cmd_name)(command(cmd_name, ANALYSES[cmd_name]))
        return typer.main.get_command(one)


app = App(
    cls=Analyses,
    help="Whole datasets seen as features: redundancy, overlap, coverage, drift, clusters.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    """Whole datasets seen as features: redundancy, overlap, coverage, drift, clusters."""


def command(name: str, analysis: Analysis) -> Callable[..., None]:
    """The command of one analysis: the shared options, and those of its function."""
    hints = get_type_hints(analysis.run, include_extras=True)
    own = {
        p.name: typer_option(p, hints[p.name])
        for p in inspect.signature(analysis.run).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }

    def run(**given: Any) -> None:
        chosen = {key: given.pop(key) for key in own}
        analyze(name, analysis, chosen, **given)

    common = get_type_hints(shared, include_extras=True)
    usual = "last" if analysis.reduction == "last" else f"{analysis.reduction} for {name}, else last"
    common["reduction"] = Annotated[str | None, typer.Option("--reduction", help=f"{REDUCTION_HELP} Default: {usual}.")]
    parameters = [p.replace(annotation=common[p.name]) for p in inspect.signature(shared).parameters.values()]
    parameters = [*parameters[:-1], *own.values(), parameters[-1]]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = str(inspect.getdoc(analysis.run)).split("\n\nRaises")[0].split("\n\nArgs")[0]
    return run


def typer_option(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    """An `Annotated[type, help]` keyword as an option."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"the option {parameter.name!r} of an analysis is Annotated[type, 'its help']")
    kind, said = get_args(hint)[:2]
    flag = "--" + parameter.name.replace("_", "-")
    limits = options.SEED if parameter.name == "seed" else {}
    return parameter.replace(
        kind=parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[kind, typer.Option(flag, help=said, **limits)]
    )


def analyze(
    name: str,
    analysis: Analysis,
    chosen: dict[str, Any],
    stores: list[Path],
    layer: int | None,
    reduction: str | None,
    phase: str | None,
    names: str | None,
    scores: list[Path] | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Read the stores, run the analysis, show what it found."""
    said = [part.strip() for part in names.split(",")] if names else [store.resolve().name for store in stores]
    if len(said) != len(stores):
        raise InputError(f"--names gives {len(said)} names for {len(stores)} stores")
    if scores and len(scores) != len(stores):
        raise InputError(f"--scores gives {len(scores)} tables for {len(stores)} stores; give one for each, in order")
    if len(stores) < analysis.datasets:
        raise InputError(f"analyze {name} needs at least {analysis.datasets} stores, not {len(stores)}")
    way = options.one_of("--reduction", reduction or analysis.reduction, REDUCTIONS)
    output.hold(out, *stores, *(scores or []))
    with output.status("reading the stores"):
        scored = scores or [None] * len(stores)
        phases = options.check_phases(phase)
        every = zip(stores, said, scored, strict=True)
        datasets = [open_dataset(*one, layer, way, analysis.texts, phases) for one in every]
    with output.status(f"analysing {name}"):
        result = analysis.run(datasets, **chosen)
    show_result(f"{name}: {', '.join(said)}", result, out, as_json)


def open_dataset(
    folder: Path,
    name: str,
    scores: Path | None,
    layer: int | None,
    reduction: str,
    texts: bool,
    phases: list[str] | None = None,
) -> Dataset:
    """One store as a dataset."""
    from qwen_scope.analysis import Dataset
    from qwen_scope.features import labels_of_store

    from .store import the_layer

    way = cast("Literal['any', 'last', 'mean', 'max']", reduction)
    with names.of_store(folder) as opened:
        where = the_layer(opened, layer)
        found = Dataset.from_store(opened, where, way, name=name, scores=scores, texts=texts, phases=phases)
        if not texts:
            return found
        labels = {feature: one.shown for (at, feature), one in labels_of_store(opened).items() if at == where}
        return replace(found, labels=labels)


def show_result(title: str, result: Result, out: Path | None, as_json: bool) -> None:
    """Tables or JSON on standard output, figures and the page in a folder."""
    if out is not None and tables.is_file(out):
        output.save([result.items] if result.items is not None else result.tables, out)
    elif out is not None:
        write_report(title, result, out)
    if as_json:
        output.print_json(strict(result.data | ({"verdict": result.verdict} if result.verdict else {})))
        return
    console = output.console()
    if result.verdict:
        console.print(result.verdict)
        console.print()
    for table in result.tables:
        output.show(table.title, table.columns, table.rows)
    for note in result.notes:
        console.print(f"Note: {note}")
    if out is not None and not tables.is_file(out):
        console.print(f"Written: {out / 'report.html'} and {len(result.figures)} figures as PNG")


def write_report(title: str, result: Result, out: Path) -> None:
    """`report.html`, every figure as `figureN.png`, and `items.csv` and `items.parquet` where an analysis has rows for
    single items: all of them, or none where one can't be written.

    Figures beyond, which an earlier report in the folder had, are removed with it.
    """
    from qwen_scope.files import write_whole
    from qwen_scope.report import figure_page, file_of, save_png

    shown = [(t.title, *names.beside(t.columns, t.rows)) for t in result.tables]
    notes = (*([result.verdict] if result.verdict else []), *result.notes)
    earlier = (out / "report.html").is_file()
    with ExitStack() as stack:
        # They are renamed in the opposite order, the page last.
        page = stack.enter_context(write_whole(out / "report.html"))
        page.write_text(figure_page(title, shown, result.figures, notes), encoding="utf-8")
        for i, figure in enumerate(result.figures, 1):
            save_png(figure, stack.enter_context(write_whole(out / f"figure{i}.png")))
        if result.items is not None:
            for kind in ("csv", "parquet"):
                stack.enter_context(write_whole(out / f"items.{kind}")).write_bytes(file_of(result.items, kind))
    for path in out.glob("figure*.png") if earlier else ():
        number = path.stem.removeprefix("figure")
        if number.isdecimal() and int(number) > len(result.figures):
            path.unlink()


def strict(value: Any) -> Any:
    """Data as JSON knows it: NumPy's numbers as Python's, what is not finite as null."""
    if isinstance(value, dict):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
