"""Runs where transformer_lens and nnsight are installed, with our source on the path: `Scope.hooks` on their objects.

Features and steered logits equal those of the scope itself, generation with a KV cache among them; then the notebook
for people who come from there runs from top to bottom.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwen_scope import Intervention, load_scope
from qwen_scope.scope import HookedFeatures, Scope
from qwen_scope.steer import Decoding, steering

TEXT = "[12:30] Anna: Guten Morgen, wo ist der"
LAYERS = [2, 4]
MORE = Intervention.add(layer=4, feature=283, amount=0.3, unit="resid_norm")
NEW = 6
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "6_coming_from_transformer_lens_or_nnsight.py"

Run = Callable[[], torch.Tensor]


def bridge(scope: Scope) -> tuple[Any, Run, Run]:
    """A model of TransformerLens around that of a scope, its logits of the text, and the ids that it generates."""
    from transformer_lens.model_bridge import TransformerBridge

    made = TransformerBridge.boot_transformers(scope.name, hf_model=scope.model, tokenizer=scope.tokenizer)
    ids = scope.tokenizer(TEXT, return_tensors="pt").input_ids
    return made, lambda: made(ids), lambda: made.generate(ids, max_new_tokens=NEW, do_sample=False, verbose=False)[0]


def nnsight(scope: Scope) -> tuple[Any, Run, Run]:
    """The same of nnsight."""
    from nnsight import LanguageModel

    made: Any = LanguageModel(scope.model, tokenizer=scope.tokenizer)

    def logits() -> torch.Tensor:
        with made.trace(TEXT):
            out = made.lm_head.output.save()
        return out

    def generated() -> torch.Tensor:
        with made.generate(TEXT, max_new_tokens=NEW, do_sample=False):
            out = made.generator.output.save()
        return out[0]

    return made, logits, generated


def checks(make: Callable[[Scope], tuple[Any, Run, Run]]) -> Iterator[tuple[str, bool]]:
    """What holds of a library's object, each with a name."""
    ours = load_scope("lab", device="cpu")
    made, logits, generated = make(load_scope("lab", device="cpu"))
    ids = ours.tokenizer(TEXT, return_tensors="pt").input_ids
    seen = ours.features(TEXT, LAYERS)
    with steering(ours.model, [MORE], ours.saes, ours.stats):
        steered = ours.model(ids).logits
    text = ours.generate(TEXT, MORE, decoding=Decoding(max_new_tokens=NEW)).text

    def same(found: HookedFeatures) -> bool:
        return all(
            torch.allclose(found[layer].to_dense()[0], seen.of(0, layer).to_dense(), atol=1e-3) for layer in LAYERS
        )

    with ours.hooks(made, layers=LAYERS) as found:
        plain = logits()
    yield "features are the scope's", same(found)
    yield "nothing changes without an intervention", torch.allclose(plain, ours.model(ids).logits, atol=1e-3)
    with ours.hooks(made, MORE, layers=[4]) as found:
        changed = logits()
    yield "steered logits are the scope's", torch.allclose(changed, steered, atol=1e-3)
    yield "and differ from the unsteered", not torch.allclose(changed, plain, atol=1e-1)
    with ours.hooks(made, MORE, layers=[4]) as found:
        tail = ours.tokenizer.decode(generated()[ids.shape[1] :], skip_special_tokens=True)
    yield f"generation under a KV cache is the scope's: {tail!r}", tail == text
    yield "each pass is kept", len(found.passes[4]) > 1
    yield "no hook remains", torch.equal(logits(), plain)
    yield "load_scope takes the object", same_as(load_scope(made, "lab"), seen)


def same_as(scope: Scope, seen: Any) -> bool:
    found = scope.features(TEXT, LAYERS)
    return all(torch.allclose(found.of(0, i).to_dense(), seen.of(0, i).to_dense(), atol=1e-3) for i in LAYERS)


def notebook() -> int:
    """How many cells of the notebook ran."""
    parts = re.split(r"^# %%", NOTEBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    names: dict[str, Any] = {"__name__": NOTEBOOK.stem}
    code = [part.partition("\n")[2] for part in parts if not part.startswith(" [markdown]")]
    for i, cell in enumerate(code):
        assert isinstance(ast.parse(cell).body[-1], ast.Expr), cell
        place = f"<cell {i}>"  # nnsight reads the source of a cell, as a notebook keeps it
        linecache.cache[place] = (len(cell), None, cell.splitlines(keepends=True), place)
        exec(compile(cell, place, "exec"), names)
    return len(code)


def main() -> None:
    failed = 0
    for make in (bridge, nnsight):
        with torch.no_grad():
            for said, held in checks(make):
                print(f"{'ok' if held else 'FAILED'}: {make.__name__}: {said}", flush=True)
                failed += not held
    print(f"ok: {notebook()} cells of {NOTEBOOK.name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
