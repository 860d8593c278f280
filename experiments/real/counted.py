"""Are sinks left out at every layer of real models, and is no ordinary token?

    python experiments/real/counted.py MODEL... --data FOLDER [--out experiments/real/counted.json]

MODEL is a folder of a model; FOLDER holds `xquad.jsonl.gz` (paragraphs in twelve languages) and `gsm8k_test.jsonl.gz`.
Thresholds are measured on one half of the texts (prose, code, arithmetic, numbers, chats; rows of 64 and 256 tokens) by
`Counted.measure`, from norms alone, and judged on the other half by what norms do not know: the attention that tokens
draw. A token is a sink at a layer if
- it is massive: longer than twice the median, and its residual points where the first token's does (cosine >= 0.9);
- it draws attention: the heads of the next block give it, on average over queries at least four tokens later, at least
  a tenth of what they give the first token of the row, and at least twice what even spreading would give.
A token that is left out is an ordinary one if it draws less than half of that; what lies between is counted apart.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_scope.model import blocks
from qwen_scope.text import Counted, start_ids

LIKE_FIRST = 0.1  # of the attention that the first token draws from the same queries
LIFT = 2.0  # over even spreading, so that layers whose first token draws nothing have no sinks
LATER = 4  # queries nearer than this look at a token for its neighbourhood
QUERIES = 8  # the fewest later queries that a token is judged by
LENGTHS = {64: 3, 256: 1}  # tokens of a row, and how many rows of each kind
MASSIVE, ALIGNED = 2.0, 0.9


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


def rows_of(tokenizer: Any, data: Path, half: int) -> dict[int, list[tuple[str, list[int]]]]:
    """Rows of token ids by their length, each with its kind; every one begins as the model expects."""
    rng, start = random.Random(half), start_ids(tokenizer)
    out: dict[int, list[tuple[str, list[int]]]] = {length: [] for length in LENGTHS}
    texts = texts_of(data, half)
    for length, n in LENGTHS.items():
        for kind, some in texts.items():
            for _ in range(n * (1 if kind.startswith("prose") and kind != "prose en" else 3)):
                joined = "\n\n".join(rng.sample(some, min(6, len(some))))
                ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
                out[length].append((kind, (start + ids)[:length]))
        if tokenizer.chat_template:
            for _ in range(3 * n):
                asked = rng.sample(texts["arithmetic"], 5)
                chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(asked)]
                ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
                out[length].append(("chat", ids[:length]))
        out[length] = [(kind, ids) for kind, ids in out[length] if len(ids) == length]
    return out


def keep(got: dict[int, torch.Tensor], layer: int, _module: Any, _args: Any, out: Any) -> None:
    """Keep the output of a block, for a forward hook."""
    got[layer] = (out if isinstance(out, torch.Tensor) else out[0]).float()


@torch.inference_mode()
def see(model: Any, rows: dict[int, list[tuple[str, list[int]]]], *, attention: bool) -> Seen:
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


def show(name: str, table: list[dict[str, Any]]) -> str:
    """The table as text; norms in medians."""
    columns = (
        ("layer", "layer"),
        ("median", "median"),
        ("first", "first token"),
        ("threshold_over_median", "threshold"),
        ("left_out", "left out"),
        ("left_out_least", "least of them"),
        ("kept_most", "most kept"),
        ("sinks", "sinks"),
        ("sinks_kept", "sinks kept"),
        ("sinks_kept_most", "longest"),
        ("ordinary_left_out", "ordinary out"),
        ("between_left_out", "between out"),
        ("massive_kept", "massive kept"),
        ("draws_of_left_out", "draws: out"),
        ("draws_of_kept", "kept"),
    )
    lines = [f"{name}: {table[0]['tokens']:,} tokens", "  ".join(title for _, title in columns)]
    for row in table:
        cells = [row[key] for key, _ in columns]
        shown = ["none" if c is None else f"{c:.2f}" if isinstance(c, float) else f"{c:,}" for c in cells]
        lines.append("  ".join(text.rjust(len(title)) for text, (_, title) in zip(shown, columns, strict=True)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for folder in options.models:
        begun = time.process_time()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # eager, so that attention can be read; the norms of the sample come from the same arithmetic
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
        sample = see(model, rows_of(tokenizer, options.data, 0), attention=False)
        counted = Counted.of(tokenizer).measure(
            dict(enumerate(sample.norms.T)), sample.positions, ids=sample.ids, sample="half of the texts, seed 0"
        )
        table = judge(counted, see(model, rows_of(tokenizer, options.data, 1), attention=True))
        record[folder.name] = {"counted": counted.to_json(), "layers": table, "seconds": time.process_time() - begun}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        sys.stdout.write(show(folder.name, table) + f"\n{time.process_time() - begun:.0f} CPU-seconds\n\n")


if __name__ == "__main__":
    main()
