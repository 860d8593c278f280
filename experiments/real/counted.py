"""Are sinks left out at every layer of real models, and is no ordinary token?

    python -m experiments.real.counted --models FOLDER,FOLDER --data FOLDER --fresh FOLDER [--write]

A model is a folder; `--data` holds `xquad.jsonl.gz` (paragraphs in twelve languages) and `gsm8k_test.jsonl.gz`;
`--fresh` holds a folder of .txt files per kind of text. Thresholds are measured on one half of the data (prose, code,
arithmetic, numbers, chats; rows of 64 and 256 tokens) by `Counted.measure`, from norms alone. They are judged on the
other half and on the fresh documents by what norms do not know: the attention that tokens draw.

The constants of the rule in `qwen_scope.text.sinks` were chosen on a recording of the same sources as this data, which
shares some of its paragraphs, so the other half is not independent of them. The fresh documents share nothing with it.

A token is a sink at a layer if
- it is massive: longer than twice the median, and its residual points where the first token's does (cosine >= 0.9);
- it draws attention: the heads of the next block give it, on average over queries at least four tokens later, at least
  a tenth of what they give the first token of the row, and at least twice what even spreading would give.
A token that is left out is an ordinary one if it draws less than half of that; what lies between is counted apart.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope.errors import InputError
from qwen_scope.model import blocks
from qwen_scope.text import Counted, start_ids

LIKE_FIRST = 0.1  # of the attention that the first token draws from the same queries
LIFT = 2.0  # over even spreading, so that layers whose first token draws nothing have no sinks
LATER = 4  # queries nearer than this look at a token for its neighbourhood
QUERIES = 8  # the fewest later queries that a token is judged by
TITLE = "Which tokens are left out as sinks"
HALF, FRESH = "the other half", "fresh documents"
MASSIVE, ALIGNED = 2.0, 0.9


@dataclass(frozen=True)
class Sizes:
    """Tokens of a row, and how many rows of each kind."""

    rows: tuple[tuple[int, int], ...] = ((64, 3), (256, 1))


@dataclass(frozen=True)
class Seen:
    """What was read of a sample: per token and layer, or per token."""

    norms: np.ndarray  # (tokens, layers)
    cosine: np.ndarray  # (tokens, layers), with the first token of the row
    lift: np.ndarray  # (tokens, layers), attention of the next block over even spreading; NaN where it is not judged
    like_first: np.ndarray  # (tokens, layers), the same over what the first token gets
    ids: np.ndarray
    positions: np.ndarray
    kinds: np.ndarray


def texts_of(data: Path, half: int) -> dict[str, list[str]]:
    """Texts by kind, of one of two halves that share no text."""

    def read(name: str) -> list[dict[str, Any]]:
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines][half::2]

    out: dict[str, list[str]] = {}
    with gzip.open(data / "xquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["id"] % 2 == half:  # one paragraph has the same id in all languages
                out.setdefault(f"prose {row['language']}", []).append(row["text"].strip())
    out["arithmetic"] = [" ".join(v for v in row.values() if isinstance(v, str)) for row in read("gsm8k_test.jsonl.gz")]
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))[half::2]
    out["code"] = [path.read_text(encoding="utf-8", errors="replace")[2000:8000] for path in library]
    rng = random.Random(half)
    out["numbers"] = [" ".join(str(rng.randrange(10 ** rng.randint(1, 8))) for _ in range(300)) for _ in range(20)]
    return out


def fresh_texts(folder: Path) -> dict[str, list[str]]:
    """Texts by kind, the names of the sub-folders.

    Raises:
        InputError: the folder has no sub-folder with .txt files.
    """
    found = {
        place.name: [path.read_text(encoding="utf-8") for path in sorted(place.glob("*.txt"))]
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    if not any(found.values()):
        raise InputError(f"{folder} holds no text; it takes a folder of .txt files for each kind of text")
    return {kind: some for kind, some in found.items() if some}


Rows = dict[int, list[tuple[str, list[int]]]]


def rows_of(tokenizer: Any, texts: Mapping[str, list[str]], sizes: Sizes, seed: int) -> Rows:
    """Rows of token ids by their length, each with its kind; every one begins as the model expects."""
    rng, start = random.Random(seed), start_ids(tokenizer)
    out: Rows = {length: [] for length, _ in sizes.rows}
    asking = texts.get("arithmetic") or [text[:400] for text in texts[next(iter(texts))]]
    for length, n in sizes.rows:
        for kind, some in texts.items():
            for _ in range(n * (1 if kind.startswith("prose") and kind != "prose en" else 3)):
                joined = "\n\n".join(rng.sample(some, min(6, len(some))))
                ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
                out[length].append((kind, (start + ids)[:length]))
        if tokenizer.chat_template:
            for _ in range(3 * n):
                asked = rng.sample(asking, 5)
                chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(asked)]
                ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
                out[length].append(("chat", ids[:length]))
        out[length] = [(kind, ids) for kind, ids in out[length] if len(ids) == length]
    return out


def keep(got: dict[int, torch.Tensor], layer: int, _module: Any, _args: Any, out: Any) -> None:
    """Keep the output of a block, for a forward hook."""
    got[layer] = (out if isinstance(out, torch.Tensor) else out[0]).float()


@torch.inference_mode()
def see(model: Any, rows: Rows, *, attention: bool) -> Seen:
    """Run the rows and keep what `Seen` holds."""
    got: dict[int, torch.Tensor] = {}
    handles = [block.register_forward_hook(partial(keep, got, i)) for i, block in enumerate(blocks(model))]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Seen.__annotations__}
    n = len(handles)
    for length, all_rows in rows.items():
        for at in range(0, len(all_rows), 1024 // length):
            batch = all_rows[at : at + 1024 // length]
            ids = torch.tensor([row for _, row in batch])
            result = model.base_model(ids, use_cache=False, output_attentions=attention)
            norms = torch.stack([got[i].norm(dim=-1) for i in range(n)], -1)
            first = torch.stack(
                [torch.nn.functional.cosine_similarity(got[i], got[i][:, :1], dim=-1) for i in range(n)], -1
            )
            lift = torch.full((len(batch), length, n), float("nan"))
            like_first = lift.clone()
            if attention:
                later = torch.tril(torch.ones(length, length), -LATER)
                judged = later.sum(0) >= QUERIES
                spread = later * torch.arange(1, length + 1)[:, None]  # even spreading gives 1 / (query + 1)
                for i in range(n - 1):
                    mean = result.attentions[i + 1].float().mean(1)
                    lift[:, judged, i] = ((mean * spread).sum(1) / later.sum(0).clamp(min=1))[:, judged]
                    drawn = (mean * later).sum(1), (mean[:, :, :1] * later).sum(1)
                    like_first[:, judged, i] = (drawn[0] / drawn[1])[:, judged]
            for name, value in (("norms", norms), ("cosine", first), ("lift", lift), ("like_first", like_first)):
                parts[name].append(value.flatten(0, 1).numpy())
            parts["ids"].append(ids.flatten().numpy())
            parts["positions"].append(np.tile(np.arange(length), len(batch)))
            parts["kinds"].append(np.repeat([kind for kind, _ in batch], length))
    for handle in handles:
        handle.remove()
    return Seen(**{name: np.concatenate(some) for name, some in parts.items()})


def judge(counted: Counted, seen: Seen) -> list[dict[str, Any]]:
    """One row of the table per layer, over tokens that neither place nor id leaves out."""
    at = counted.at(torch.from_numpy(seen.ids), torch.from_numpy(seen.positions)).numpy()
    table = []
    for layer, (name, limit) in enumerate(counted.norms.items()):
        size, draws = (
            seen.norms[:, layer],
            np.minimum(seen.like_first[:, layer] / LIKE_FIRST, seen.lift[:, layer] / LIFT),
        )
        median = float(np.median(size[at]))
        out = at & (size > (np.inf if limit is None else limit))
        judged = at & np.isfinite(draws)
        massive = judged & (size > MASSIVE * median) & (seen.cosine[:, layer] >= ALIGNED)
        sink = massive & (draws >= 1)
        table.append(
            {
                "layer": layer,
                "hook_point": name,
                "median": median,
                "first": float(np.median(size[seen.positions == 0]) / median),
                "threshold": limit,
                "threshold_over_median": None if limit is None else limit / median,
                "tokens": int(at.sum()),
                "left_out": int(out.sum()),
                "left_out_least": float(size[out].min() / median) if out.any() else None,
                "kept_most": float(size[at & ~out].max() / median),
                "judged": int(judged.sum()),
                "sinks": int(sink.sum()),
                "sinks_kept": int((sink & ~out).sum()),
                "sinks_kept_most": float(size[sink & ~out].max() / median) if (sink & ~out).any() else None,
                "ordinary_left_out": int((out & judged & (draws < 0.5)).sum()),
                "between_left_out": int((out & judged & (draws >= 0.5) & ~sink).sum()),
                "massive_kept": int((massive & ~out).sum()),
                "draws_of_left_out": float(np.median(draws[out & judged])) if (out & judged).any() else None,
                "draws_of_kept": float(np.median(draws[judged & ~out])) if np.isfinite(draws).any() else None,
            }
        )
    return table


@cache
def opened(folder: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    torch.manual_seed(0)
    # eager, so that attention can be read; the norms of the sample come from the same arithmetic
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


@cache
def measured(folder: str, data: Path, sizes: Sizes) -> Counted:
    """Thresholds from the first half of the data."""
    model, tokenizer = opened(folder)
    sample = see(model, rows_of(tokenizer, texts_of(data, 0), sizes, 0), attention=False)
    norms = dict(enumerate(sample.norms.T))
    return Counted.of(tokenizer).measure(norms, sample.positions, ids=sample.ids, sample="half of the texts, seed 0")


def run(at: At[Sizes], model: str, text: str) -> dict[str, Any]:
    """The thresholds of one model and how they do on other texts."""
    data, fresh = at.options["data"], at.options["fresh"]
    if text == FRESH and fresh is None:
        raise InputError(f"fresh documents need --fresh FOLDER; without it name --texts {HALF!r}")
    counted = measured(model, data, at.sizes)
    loaded, tokenizer = opened(model)
    texts = texts_of(data, 1) if text == HALF else fresh_texts(fresh)
    rows = rows_of(tokenizer, texts, at.sizes, 1 if text == HALF else 2)
    return {"counted": counted.to_json(), "layers": judge(counted, see(loaded, rows, attention=True))}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    how = """`python -m experiments.real.counted --write`: thresholds by `Counted.measure` on one half of the data
        (prose in twelve languages, code, arithmetic, numbers, chats), judged on the other half, and on fresh documents
        that share nothing with what the constants of the rule were chosen on. Of each layer: the threshold in medians;
        the tokens left out by their norm; the sinks, which are longer than twice the median, point where the first
        token does and draw attention in the next block; sinks left in; and tokens left out that draw little
        (ordinary), or less than a sink has to (between). First tokens and special tokens are left out everywhere and
        not counted here. The last layer has no next block to judge it by. Norms cannot judge what they do not separate:
        at a layer without a threshold only first and special tokens are left out."""
    parts = [paragraph(how)]
    for model in dict.fromkeys(row["model"] for row in rows):
        some = {row["text"]: row["layers"] for row in rows if row["model"] == model}
        tokens = ", ".join(f"{layers[0]['tokens']:,} tokens of {text}" for text, layers in some.items())
        parts += [f"{Path(model).name}: {tokens}.", layers_of(some)]
    return "\n\n".join(parts)


def layers_of(judged: Mapping[str, Sequence[Row]]) -> str:
    """One line per layer, the texts side by side."""
    figures = ("left_out", "sinks", "sinks_kept", "ordinary_left_out", "between_left_out")
    names = ("left out", "sinks", "left in", "ordinary", "between")
    columns = ["layer", "threshold"]
    columns += [name if i == 0 else f"{name}, fresh" for i, _ in enumerate(judged) for name in names]
    lines, total = [], np.zeros(len(names) * len(judged), int)
    for layers in zip(*judged.values(), strict=True):
        limit = layers[0]["threshold_over_median"]
        cells = [layer[name] for layer in layers for name in figures]
        total += np.array(cells)
        lines.append((layers[0]["layer"], "none" if limit is None else float(limit), *cells))
    return table(columns, [*lines, ("all", "", *total)])


experiment = Experiment(
    title=TITLE,
    varies={"model": (), "text": (HALF, FRESH)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"text": (HALF,)},
    quick_sizes=Sizes(rows=((64, 1),)),
    options={
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz and gsm8k_test.jsonl.gz"},
        "fresh": {"type": Path, "help": "a folder with a folder of .txt files for each kind of text"},
    },
)

if __name__ == "__main__":
    main(experiment)
