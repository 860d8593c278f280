"""The options of `qwen-scope posttrain`: fields of the library's own objects, as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_scope.posttrain import (
    Detector,
    ModelEvalRun,
    PrepareRun,
    RepetitionRun,
    RLData,
    RLRun,
    Sampling,
    SFTData,
    SFTRun,
)
from qwen_scope.text import CorpusOptions

from . import options
from .groups import OPTIONS, Group, Read

Samples = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A file, folder or dataset whose rows name their group, or 'lab'.")
]
Prompts = Annotated[str, typer.Argument(metavar="PROMPTS", help="A file whose rows have a prompt, or 'lab'.")]
PromptColumn = Annotated[str, typer.Option("--prompt-column", help="The prompt, where completions are learnt.")]
GroupColumn = Annotated[str, typer.Option("--group-column", help="The name of a row's group, such as its language.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.", **options.SEED)]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Where an answer is cut off.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the draws.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw among the most probable tokens that make up this share.")]
Lora = Annotated[int | None, typer.Option("--lora", help="Rank of adapters instead of all weights.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Recompute to save memory.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Mixed precision.")]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints; 0 for none.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the run.")]
LossRows = Annotated[str | None, typer.Option("--held-out", help="Rows to report the loss on.")]
Model = Annotated[options.Model, Read(str, "lab")]

OPTIONS[PrepareRun] = {
    "source": Samples,
    "target": Annotated[str, typer.Option("--target", help="The group whose features are wanted.")],
    "layers": Annotated[options.LastLayers, Read(options.layers_tuple)],
    "features": Annotated[int, typer.Option("--features", help="How many per layer.", min=1)],
    "onsets": Annotated[
        str | None,
        typer.Option("--onsets", help="Rows to learn from, or 'lab': rank by what begins --script in their answers."),
    ],
    "script": Annotated[
        str | None, typer.Option("--script", help="The target's script (CJK, ...), for --onsets and the penalty.")
    ],
    "quantile": Annotated[
        float | None,
        typer.Option("--quantile", help="Alpha is this quantile of the pre-activations, not their mean.", min=0, max=1),
    ],
    "at_random": Annotated[
        int | None,
        typer.Option("--random", help="A seed that draws other features instead: the control.", **options.SEED),
    ],
    "group_column": GroupColumn,
    "reading": Group(CorpusOptions, without=("chat",)),
}
OPTIONS[SFTRun] = {
    "out": Out,
    "method": Annotated[
        str, typer.Option("--method", help="plain, features (SASFT) or penalty (on the target's own tokens).")
    ],
    "model": Model,
    "sae": options.Sae,
    "layers": Annotated[options.TableLayers, Read(lambda text: options.layers_tuple(text) or None)],
    "weight": Annotated[float, typer.Option("--weight", help="Lambda of the extra term.", min=0)],
    "lambda_scale": Annotated[
        str,
        typer.Option(
            "--lambda-scale",
            help="mean: lambda times the mean over a step; published: times the sum over its forward passes, as SASFT's"
            " code does, which at --batch 1 --accumulate 32 is about 32 times as strong.",
        ),
    ],
    "zero": Annotated[bool, typer.Option("--zero", help="Thresholds of zero instead of alpha.")],
    "enhance": Annotated[bool, typer.Option("--enhance", help="Lift the features on the target instead.")],
    "lr": Annotated[float, typer.Option("--lr", help="Peak learning rate.")],
    "batch": Annotated[int, typer.Option("--batch", help="Samples per forward pass.", min=1)],
    "accumulate": Annotated[int, typer.Option("--accumulate", help="Forward passes per step.", min=1)],
    "epochs": Annotated[float, typer.Option("--epochs", help="Times through the rows.")],
    "max_steps": Annotated[int, typer.Option("--max-steps", help="-1 for whole epochs.")],
    "warmup": Annotated[int, typer.Option("--warmup", help="Steps.", min=0)],
    "max_length": Annotated[int, typer.Option("--max-length", help="Tokens per sample, or per packed row.")],
    "lora": Lora,
    "packing": Annotated[bool, typer.Option("--packing", help="Several samples in one row.")],
    "checkpointing": Checkpointing,
    "bf16": Bf16,
    "watch_every": Annotated[
        int | None, typer.Option("--monitor-every", help="Steps between measurements. Default: 2% of the time.", min=1)
    ],
    "save_every": SaveEvery,
    "resume": Resume,
    "seed": Seed,
    "device": options.Device,
    "dtype": options.Dtype,
}
OPTIONS[SFTData] = {
    "source": Samples,
    "table": Annotated[Path | None, typer.Option("--table", help="The alpha table that prepare has written.")],
    "held_out": LossRows,
    "prompt_column": PromptColumn,
    "group_column": GroupColumn,
    "reading": Group(CorpusOptions, without=("seed",)),
    "monitor": Annotated[
        str | None,
        typer.Option("--monitor", help="Watch features on a text per line, rows with a text, or 'lab'."),
    ],
    "monitor_prompts": Annotated[
        str | None,
        typer.Option("--monitor-prompts", help="Also watch them in answers to these: rows with a prompt, or 'lab'."),
    ],
}
OPTIONS[ModelEvalRun] = {
    "prompts": Annotated[
        str | None,
        typer.Argument(help="A .txt file with a prompt per line, rows with a prompt, or 'lab'.", show_default=False),
    ],
    "script": Annotated[
        str | None, typer.Option("--script", help="The script that answers should not hold: CJK, HANGUL, CYRILLIC, ...")
    ],
    "groups": Annotated[
        str | None,
        typer.Option("--groups", help="Only prompts of these groups, a,b,...; in the lab languages."),
        Read(options.names_tuple),
    ],
    "held_out": LossRows,
    "model": options.Model,
    "samples": Annotated[int, typer.Option("--samples", help="Answers per prompt.", min=1)],
    "temperature": Temperature,
    "top_p": TopP,
    "max_new_tokens": NewTokens,
    "prompt_column": PromptColumn,
    "group_column": GroupColumn,
    "n": Annotated[int | None, typer.Option("-n", help="At most this many prompts, and rows to report on.", min=1)],
    "seed": Seed,
    "reading": CorpusOptions,
    "device": options.Device,
    "dtype": options.Dtype,
}
OPTIONS[Detector] = {
    "longest": Annotated[int, typer.Option("--longest", help="A loop's block in tokens, at most.", min=1)],
    "times": Annotated[int, typer.Option("--times", help="How often a loop's block stands in a row, at least.", min=2)],
    "least": Annotated[int, typer.Option("--least", help="How many tokens a loop is long, at least.", min=1)],
}
OPTIONS[Sampling] = {
    "max_new_tokens": NewTokens,
    "temperature": Temperature,
    "top_p": TopP,
    "detector": Detector,
    "seed": Seed,
}
OPTIONS[RepetitionRun] = {
    "source": Prompts,
    "layers": Annotated[options.Layers, Read(options.layers_tuple)],
    "features": Annotated[int, typer.Option("--features", help="How many in all.", min=1)],
    "amount": Annotated[
        float | None, typer.Option("--amount", help="Of each, in median residual norms. Default: enough for half.")
    ],
    "samples": Annotated[int, typer.Option("--samples", help="Answers per prompt to look for loops in.", min=1)],
    "looping": Annotated[
        str | None, typer.Option("--looping", help="Texts that end in a loop, beside the model's own.")
    ],
    "n": Annotated[int, typer.Option("-n", help="At most this many prompts.", min=2)],
    "sampling": Sampling,
    "reading": CorpusOptions,
}
OPTIONS[RLRun] = {
    "out": Out,
    "method": Annotated[
        str, typer.Option("--method", help="steered, vanilla, or random (features of equal frequency and length).")
    ],
    "reward": Annotated[
        str | None, typer.Option("--reward", help="lab, answer, language or module:function. Default: lab or answer.")
    ],
    "model": Model,
    "sae": options.Sae,
    "unchecked": Annotated[bool, typer.Option("--unchecked", help="Take a recipe whose check does not hold.")],
    "group": Annotated[int, typer.Option("--group", help="Answers per prompt.", min=2)],
    "prompts": Annotated[int, typer.Option("--prompts", help="Prompts per step.", min=1)],
    "micro": Annotated[int, typer.Option("--micro", help="Answers per forward pass.", min=1)],
    "steps": Annotated[int, typer.Option("--steps", help="Optimiser steps.", min=1)],
    "updates": Annotated[int, typer.Option("--updates", help="Of the weights per answer.", min=1)],
    "lr": Annotated[float, typer.Option("--lr", help="Learning rate.")],
    "warmup": Annotated[int, typer.Option("--warmup", help="Steps.", min=0)],
    "max_new_tokens": NewTokens,
    "temperature": Temperature,
    "top_p": TopP,
    "detector": Detector,
    "lora": Lora,
    "checkpointing": Checkpointing,
    "bf16": Bf16,
    "save_every": SaveEvery,
    "resume": Resume,
    "seed": Seed,
    "device": options.Device,
    "dtype": options.Dtype,
}
OPTIONS[RLData] = {
    "source": Prompts,
    "recipe": Annotated[Path | None, typer.Option("--recipe", help="What `repetition` has written.")],
    "held_out": Annotated[str | None, typer.Option("--held-out", help="Prompts to measure loops on.")],
    "n": Annotated[int, typer.Option("-n", help="At most this many prompts.", min=2)],
    "held_out_n": Annotated[int, typer.Option("--held-out-n", help="At most this many held-out ones.", min=2)],
    "reading": Group(CorpusOptions, without=("seed",)),
    "answer_column": Annotated[str, typer.Option("--answer-column", help="The right answer, for that reward.")],
}
