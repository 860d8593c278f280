"""The scoreboard of an SAE on a real pretrained model.

    python -m experiments.real.scoreboard --model FOLDER --saes FOLDER --data FOLDER --probes WHEEL [--write]

The model is SmolLM2-135M-Instruct in the report; `--data` holds `xquad.jsonl.gz`, whose English, German and Spanish
paragraphs are the text (every tenth is measured on, controls are trained on the others), and `--probes` is sae-probes'
wheel: the five datasets below for probing and contrasts, its sets and pairs for perturbations. The run goes on where it
was stopped.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness import At, Experiment, Row, main
from experiments.scoreboards import measured, told
from experiments.sections import paragraph
from qwen_scope.files import write_text
from qwen_scope.score import ScoreRun

DATASETS = ("87_glue_cola", "113_movie_sent", "5_hist_fig_ismale", "105_click_bait", "106_hate_hate")
LANGUAGES = ("en", "de", "es")
TITLE = "A scoreboard on a real model"


@dataclass(frozen=True)
class Sizes:
    """Tokens of measuring and of the controls, and texts per dataset."""

    tokens: int = 4096
    train_tokens: int = 65_536
    batch: int = 1024
    rows: int = 140
    context_length: int = 128


def run(at: At[Sizes], layer: int) -> dict[str, Any]:
    """The scoreboard of one layer; what the folder holds is not measured again."""
    sizes, text = at.sizes, at.folder / "text.jsonl"
    if not text.is_file():
        with gzip.open(Path(at.options["data"]) / "xquad.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [one for one in map(json.loads, lines) if one["language"] in LANGUAGES]
        rows.sort(key=lambda one: (one["id"], one["language"]))
        write_text(text, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    return measured(
        ScoreRun(
            str(at.options["saes"]), str(text), at.folder / f"score-{layer}", str(at.options["model"]), layers=(layer,),
            probes=Path(at.options["probes"]), datasets=DATASETS, rows=sizes.rows, tokens=sizes.tokens,
            train_tokens=sizes.train_tokens, batch=sizes.batch, context_length=sizes.context_length, device="cpu",
        )
    )  # fmt: skip


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    sizes = at.sizes
    how = f"""`python -m experiments.real.scoreboard --write`: {sizes.tokens:,} tokens of XQuAD's English, German and
        Spanish paragraphs, controls of {sizes.train_tokens:,} tokens; five of sae-probes' datasets with {sizes.rows}
        texts each, its sets and pairs for perturbations. A star marks a control that is not worse."""
    parts = [paragraph(how)]
    for row in rows:
        parts += [f"### Layer {row['layer']}", told(row["tables"], row["unmeasured"])]
    return "\n\n".join(parts)


experiment = Experiment(
    title=TITLE,
    varies={"layer": (18,)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={},
    quick_sizes=Sizes(tokens=256, train_tokens=1024, rows=40),
    options={
        "model": {"required": True, "help": "a folder"},
        "saes": {"required": True, "help": "a folder of its SAEs"},
        "data": {"required": True, "help": "a folder with xquad.jsonl.gz"},
        "probes": {"required": True, "help": "the wheel or folder of sae-probes"},
    },
)

if __name__ == "__main__":
    main(experiment)
