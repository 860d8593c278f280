"""`qwen-scope`: the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    analyze,
    card,
    catalog,
    classify,
    compare,
    convert,
    demo,
    evaluate,
    explore,
    export,
    extract,
    features,
    find,
    lab,
    label,
    lens,
    match,
    output,
    plan,
    posttrain,
    score,
    serve,
    show,
    steer,
    store,
    sweep,
    synthesize,
    train,
    validate,
    why,
)
from .commands import App

app = App(
    name="qwen-scope",
    help="Look into, steer and train Qwen models through sparse autoencoders. Start with: qwen-scope demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say_version(asked: bool) -> bool:
    """Print the version and end the command if it was `asked` for."""
    if asked:
        import qwen_scope

        output.write(f"qwen-scope {qwen_scope.__version__}\n")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


START, LOOK, CORPORA = "First steps", "Features of a text", "Features of a corpus"
STEERING, TRAIN = "Steering", "SAEs and training"

app.command("demo", rich_help_panel=START)(demo.demo)
app.add_typer(lab.app, name="lab", rich_help_panel=START)
app.command("catalog", rich_help_panel=START)(catalog.catalog)
app.command("plan", rich_help_panel=START)(plan.plan)
app.command("features", rich_help_panel=LOOK)(features.features)
app.command("compare", rich_help_panel=LOOK)(compare.compare)
app.command("find", rich_help_panel=LOOK)(find.find)
app.add_typer(lens.app, name="lens", rich_help_panel=LOOK)
app.command("why", rich_help_panel=LOOK)(why.why)
app.command("show", rich_help_panel=LOOK)(show.show)
app.command("card", rich_help_panel=LOOK)(card.card)
app.command("match", rich_help_panel=LOOK)(match.match)
app.command("explore", rich_help_panel=LOOK)(explore.explore)
app.command("extract", rich_help_panel=CORPORA)(extract.extract)
app.add_typer(store.app, name="store", rich_help_panel=CORPORA)
app.command("label", rich_help_panel=CORPORA)(label.label)
app.command("export", rich_help_panel=CORPORA)(export.export)
app.add_typer(analyze.app, name="analyze", rich_help_panel=CORPORA)
app.add_typer(classify.app, name="classify", rich_help_panel=CORPORA)
app.command("synthesize", rich_help_panel=CORPORA)(synthesize.synthesize)
app.command("steer", rich_help_panel=STEERING)(steer.steer)
app.command("sweep", rich_help_panel=STEERING)(sweep.sweep)
app.command("validate", rich_help_panel=STEERING)(validate.validate)
app.command("serve", rich_help_panel=STEERING)(serve.serve)
app.command("train", rich_help_panel=TRAIN)(train.train)
app.command("eval", rich_help_panel=TRAIN)(evaluate.evaluate)
app.command("score", rich_help_panel=TRAIN)(score.score)
app.command("convert", rich_help_panel=TRAIN)(convert.convert)
app.add_typer(posttrain.app, name="posttrain", rich_help_panel=TRAIN)
