"""SAEs of a real model, continued on a fine-tune of it: do they reach in a fifth of the tokens what new ones do?

    python -m experiments.real.continued --model FOLDER --saes FOLDER --data FOLDER [--seeds 1,2,3] [--write]

The model is SmolLM2-135M-Instruct in the report; `--saes` holds SAEs of it, `--data` holds `xquad.jsonl.gz` and
`gsm8k_test.jsonl.gz`. The checkpoint: every weight fine-tuned on the first 60 German paragraphs of XQuAD (128 tokens of
each), once. The residuals of one layer on other text (the other German paragraphs, English, Spanish, school problems,
the manual of Python), shuffled by document. The arms are those of `experiments.lab.start_from`: an SAE from scratch on
all tokens by the defaults of `TrainConfig`; the base's SAE continued on the first fifth of the same tokens by the
defaults of `TrainConfig.continuing`; one from scratch on that fifth; and the base's SAE as it is. For comparison, at
equal tokens, the base's SAE continued on all of them. A seed is of the SAE's beginning and of the order of residuals.

The rule, fixed before the run: for every seed, the FVU of the continued SAE on held-out tokens is at most that of the
one from scratch on all tokens.
"""

from __future__ import annotations

import gzip
import json
import pydoc_data.topics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.continuing import (
    HELD_OUT,
    HOLD_OUT,
    TRAINING,
    cosines_of,
    fvu_of,
    residuals_of,
    rule_in_words,
    tokens_of,
    trained,
    whole_seeds,
)
from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope.model import HookPoint, load_model
from qwen_scope.posttrain import SFTRun, run_sft
from qwen_scope.sae import load_sae
from qwen_scope.text import Corpus

LAYER = 6
ARMS = ("scratch", "continued", "scratch on a fifth", "as it is", "continued on all")
LANGUAGES = ("de", "en", "es")
TUNING: dict[str, Any] = {
    "method": "plain", "lr": 1e-4, "batch": 4, "accumulate": 1, "warmup": 3, "max_length": 128, "seed": 1,
    "save_every": 0, "device": "cpu", "dtype": "float32",
}  # fmt: skip
TITLE = "SAEs continued on a fine-tune of a real model"


@dataclass(frozen=True)
class Sizes:
    """Training tokens, held-out tokens, and paragraphs of the fine-tuning."""

    tokens: int = 256_000
    held_out: int = 16_384
    texts: int = 60


def lines(at: At[Sizes], name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(at.options["data"] / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def documents(at: At[Sizes]) -> tuple[list[str], list[str]]:
    """What the checkpoint is tuned on, and what SAEs are trained and measured on."""
    found = {language: [] for language in LANGUAGES}
    for row in lines(at, "xquad"):
        if row["language"] in found:
            found[row["language"]].append(row["text"])
    tuned = found["de"][: at.sizes.texts]
    rest = [*found["de"][at.sizes.texts :], *found["en"], *found["es"], *pydoc_data.topics.topics.values()]
    problems = [f"{row['question']}\n{row['answer']}" for row in lines(at, "gsm8k_test")]
    return tuned, [*rest, *problems]


def tuned(at: At[Sizes]) -> Path:
    """The fine-tuned checkpoint, made once."""
    folder = at.folder / "tuned"
    if not (folder / "model" / "config.json").is_file():
        texts = [{"text": text, "group": "de"} for text in documents(at)[0]]
        run_sft(SFTRun(model=str(at.options["model"]), out=folder, **TUNING), texts)
    return folder / "model"


def residuals(at: At[Sizes], model: Path, name: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Residuals of a checkpoint on the training documents and on held-out ones, without sinks; made once."""
    kept = at.folder / f"{name}.pt"
    if kept.is_file():
        return torch.load(kept)
    texts = documents(at)[1]
    found = residuals_of(
        load_model(model, device="cpu", dtype="bfloat16"),
        lambda held_out: Corpus(texts, hold_out=HOLD_OUT, held_out=held_out, shuffle=1, name="documents"),
        HookPoint(LAYER),
        sizes,
        seed=1,
        sample="the documents",
    )
    torch.save(found, kept)
    return found


def run(at: At[Sizes], seed: int, arm: str) -> Mapping[str, Any]:
    """One SAE: trained, and measured."""
    torch.set_num_threads(1)
    parts = residuals(at, tuned(at), "residuals", {TRAINING: at.sizes.tokens, HELD_OUT: at.sizes.held_out})
    x, base = parts[TRAINING], load_sae(str(at.options["saes"]), LAYER)
    sae, tokens, own = base, 0, None
    if arm == "as it is":
        before = residuals(at, at.options["model"], "residuals-base", {HELD_OUT: at.sizes.held_out})
        own = fvu_of(base, before[HELD_OUT])
    else:
        tokens = tokens_of(arm, x, ["scratch", "continued on all"])
        sae = trained(base, x[:tokens], HookPoint(LAYER), seed, continued=arm.startswith("continued"))
    cosine = float(cosines_of(sae, base).median())
    return {"fvu": fvu_of(sae, parts[HELD_OUT]), "tokens": tokens, "cosine": cosine, "on_base": own}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    found, seeds = whole_seeds(rows, ARMS)
    if not seeds:
        return "No seed has all arms yet."
    cells, gaps = [], []
    for seed in seeds:
        one = {arm: found[seed, arm] for arm in ARMS}
        gaps.append(one["continued"]["fvu"] - one["scratch"]["fvu"])
        shown = ("as it is", "scratch on a fifth", "continued", "scratch", "continued on all")
        figures = [f"{one[arm]['fvu']:.4f}" for arm in shown]
        cells.append([seed, *figures, f"{gaps[-1]:+.4f}", f"{one['continued']['cosine']:.3f}"])
    tokens = {arm: found[seeds[0], arm]["tokens"] for arm in ("continued", "scratch")}
    how = f"""`python -m experiments.real.continued --model FOLDER --saes FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name}, every weight fine-tuned on {at.sizes.texts} German paragraphs (128 tokens of
        each, peak learning rate {TUNING["lr"]:g}). SAEs of layer {LAYER} on other text (German, English and Spanish
        paragraphs, school problems, the manual of Python): from scratch on {tokens["scratch"]:,} tokens; the base's
        SAE, continued on the first {tokens["continued"]:,} of the same residuals; from scratch on those; and continued
        on all. Each by its own defaults and with its own schedule; sinks left out; FVU on {at.sizes.held_out:,}
        held-out tokens. The cosine is the median over features of decoder directions before and after a fifth. The
        rule, fixed before the run: for every seed, the FVU of the SAE continued on a fifth is at most that of the one
        from scratch on all tokens."""
    columns = (
        "seed", "base SAE as it is", "scratch, a fifth", "continued, a fifth", "scratch", "continued on all",
        "difference", "cosine",
    )  # fmt: skip
    on_base = found[seeds[0], "as it is"]["on_base"]
    verdict = f"""The base SAE leaves {on_base:.4f} of the base's own residuals unexplained on the same documents.
        {rule_in_words(gaps)}"""
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(verdict)])


experiment = Experiment(
    title=TITLE,
    varies={"seed": (1, 2, 3), "arm": ARMS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (1, 2)},
    quick_sizes=Sizes(tokens=20_480, held_out=4096, texts=4),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "saes": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz and gsm8k_test.jsonl.gz"},
    },
)

if __name__ == "__main__":
    main(experiment)
