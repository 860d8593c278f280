"""How good a model is at what post-training changes: answers without a foreign script, loss on held-out rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_scope.model import load_model
from qwen_scope.report import Progress
from qwen_scope.scope import model_source

from .codeswitch import code_switch_ratio
from .data import ModelEvalRun
from .sft import held_out_loss
from .sources import read_prompts, training_samples


def evaluate_model(run: ModelEvalRun, *, progress: Progress | None = None) -> dict[str, Any]:
    """How often a model's answers hold a script they should not, and its loss on held-out rows, as plain data.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        as `code_switch_ratio` and `held_out_loss`, and whatever reading raises.
    """
    report = progress or (lambda stage, share, text: None)
    asked: list[str] = []
    if run.prompts is not None:
        how = replace(run.reading, column=run.prompt_column)
        asked = read_prompts(run.prompts, how, run.group_column, run.groups, run.n, run.model)
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    found: dict[str, Any] = {"model": run.model}
    if run.script is not None:
        switch = code_switch_ratio(
            loaded.model, loaded.tokenizer, asked, run.script, samples=run.samples, temperature=run.temperature,
            top_p=run.top_p, max_new_tokens=run.max_new_tokens, seed=run.seed, progress=report,
        )  # fmt: skip
        found |= {"script": run.script, "prompts": len(asked), "samples": run.samples}
        found["code_switch_ratio"] = switch.ratio
    if run.held_out is not None:
        report("loss", 0.0, "")
        # The same rows whatever the seed of the answers is.
        how = replace(run.reading, sample=run.reading.sample or run.n, seed=1)
        rows = training_samples(run.held_out, how, run.prompt_column, run.group_column, run.model)
        found["held_out_loss"] = held_out_loss(loaded, rows)
    return found
