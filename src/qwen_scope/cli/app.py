"""`qwen-scope`: the commands."""

from __future__ import annotations

import typer

from . import (
    analyze,
    catalog,
    classify,
    compare,
    convert,
    demo,
    explore,
    export,
    extract,
    features,
    find,
    lab,
    label,
    plan,
    posttrain,
    posttrain_rl,
    show,
    steer,
    store,
    sweep,
    synthesize,
    train,
    validate,
)

app = typer.Typer(
    name="qwen-scope",
    help="Look into, steer and train Qwen models through sparse autoencoders. Start with: qwen-scope demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("catalog")(catalog.catalog)
app.command("plan")(plan.plan)
app.command("convert")(convert.convert)
app.command("features")(features.features)
app.command("compare")(compare.compare)
app.command("extract")(extract.extract)
app.command("store")(store.store)
app.command("find")(find.find)
app.command("export")(export.export)
app.command("label")(label.label)
app.command("show")(show.show)
app.command("steer")(steer.steer)
app.command("sweep")(sweep.sweep)
app.command("validate")(validate.validate)
app.command("train")(train.train)
app.command("eval")(train.evaluate)
app.command("synthesize")(synthesize.synthesize)
app.command("explore")(explore.explore)
app.add_typer(lab.app, name="lab")
posttrain.app.command("repetition")(posttrain_rl.repetition)
posttrain.app.command("rl")(posttrain_rl.rl)
app.add_typer(posttrain.app, name="posttrain")
app.add_typer(analyze.app, name="analyze")
app.add_typer(classify.app, name="classify")
