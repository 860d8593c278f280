"""The scoreboard of an SAE of a pretrained model, beside the three controls.

    python -m experiments.real.scoreboard --model FOLDER --sae FOLDER --data FOLDER --probes WHEEL [--write]

`--data` holds, in `corpus`, files `LANGUAGE.SOURCE.jsonl`, of which the English ones are taken; every tenth document is
measured on, and the controls are trained on the others. `--probes` is the wheel of sae-probes, whose `DATASETS` are
every twelfth of its binary ones. The model reads in bfloat16. Settings were fixed before the figures that are reported;
a star says where a control is not worse. `score` keeps what it has measured, so a run that was stopped goes on within a
layer, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness import At, Experiment, Row, main
from experiments.scoreboards import measured, told
from experiments.sections import paragraph
from qwen_scope.errors import InputError
from qwen_scope.score import ScoreRun

TITLE = "Scoreboard of an SAE on a real model"
DATASETS = (
    "5_hist_fig_ismale", "47_reasoning_tf", "61_wikidata_occupation_isactor", "73_control-group", "85_mental-health",
    "107_hate_offensive", "123_world_country_United_Kingdom", "135_context_type_Event_duration",
    "147_disease_class_nervous system diseases", "159_code_Python",
)  # fmt: skip

SUITES = ("probes", "tpp", "scr", "contrast", "absorption")
"""Without `steering`, which does not tell the lab's SAE from its controls."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of measuring and of each control, and texts per dataset."""

    tokens: int = 4096
    train_tokens: int = 100_000
    batch: int = 1024
    rows: int = 140


def english(at: At[Sizes]) -> Path:
    """A folder of links to the English files of the corpus."""
    place = at.folder / "english"
    place.mkdir(parents=True, exist_ok=True)
    files = sorted((at.options["data"] / "corpus").glob("en.*.jsonl"))
    if not files:
        raise InputError(f"{at.options['data']} has no files corpus/en.*.jsonl")
    for file in files:
        if not (place / file.name).exists():
            (place / file.name).symlink_to(file.resolve())
    return place


def run(at: At[Sizes], layer: int) -> dict[str, Any]:
    """The scoreboard of one layer's SAE."""
    sizes, given = at.sizes, at.options
    found = measured(
        ScoreRun(
            str(given["sae"]), str(english(at)), at.folder / f"score-{layer}", str(given["model"]), layers=(layer,),
            probes=given["probes"], datasets=DATASETS, rows=sizes.rows, tokens=sizes.tokens,
            train_tokens=sizes.train_tokens, batch=sizes.batch, suites=SUITES, dtype="bfloat16", device="cpu",
        )
    )  # fmt: skip
    return {**found, "files": len(list(english(at).iterdir()))}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    sizes = at.sizes
    behind = "; ".join(f"layer {row['layer']}: {not_ahead(row['tables']) or 'none'}" for row in rows)
    how = f"""Figures in which a control does as well as the SAE or better: {behind}. Made by `python -m
        experiments.real.scoreboard --model FOLDER --sae FOLDER --data FOLDER --probes WHEEL --write`:
        {Path(at.options["model"]).name} with {Path(at.options["sae"]).name}; {sizes.tokens:,} tokens of every tenth
        document of {rows[0]["files"]} files of English, controls of {sizes.train_tokens:,} tokens of the others. The
        SAE was trained on 1.5 million tokens of this corpus without such a split: it may have seen the documents that
        it is measured on, and it saw 15 times as many tokens as the controls, so its gains over them are not those
        of equal training. Labelled texts: {len(DATASETS)} of sae-probes' 113 binary datasets, every twelfth,
        {sizes.rows} texts of each. Loss of steering was left out: it does not tell the lab's SAE from its controls.
        `dead` is the share of features that are silent on the tokens measured. A star marks a control that is not
        worse."""
    parts = [paragraph(how)]
    for row in rows:
        parts += [f"### Layer {row['layer']}", told(row["tables"], row["unmeasured"])]
    return "\n\n".join(parts)


def not_ahead(tables: Mapping[str, list[Any]]) -> str:
    """The figures, each with the controls that do as well or better."""
    found = []
    for name, figures in tables.items():
        for figure, _, others in figures:
            arms = [arm for arm, _, gain in others if gain is not None and gain <= 0]
            if arms:
                found.append(f"{figure} {name if name.endswith('sinks') else f'of {name}'} ({', '.join(arms)})")
    return ", ".join(found)


experiment = Experiment(
    title=TITLE,
    varies={"layer": (18,)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={},
    quick_sizes=Sizes(tokens=1024, train_tokens=4096, rows=56),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the language model"},
        "sae": {"type": Path, "required": True, "help": "the folder of SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with corpus/en.*.jsonl"},
        "probes": {"type": Path, "required": True, "help": "the wheel or folder of sae-probes"},
    },
)

if __name__ == "__main__":
    main(experiment)
