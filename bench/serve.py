"""What serving with the plugin costs: tokens per second of vLLM under `add`, `clamp` and `read`, in one run.

    .venv-serve/bin/python bench/serve.py MODEL [--batch 8] [--rounds 12] [--new 48] [--layer N] [--write]

One engine, an SAE of 4,096 random features at one layer, prompts of random tokens. Every round runs all conditions in
an order that rotates, unsteered twice: what the second differs from the first is the noise of the others.
`clamp` is measured on a feature that is almost never active and on one that always is. Where vLLM runs on a GPU, give
--batch 1, 32 and 256, and compare with `--without`, an engine that never heard of the plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_PLUGINS", "qwen_scope")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from side_by_side import markdown, write
from steer_cost import median_interval
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

from qwen_scope.model import load_config
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.serve import FIELD, Ask, Read, ServeSettings, engine_arguments
from qwen_scope.steer import Intervention, Where

WIDTH, K, PROMPT = 4096, 32, 16
AIM = 0.90
AIMS = {"unsteered": "", "unsteered again": "the control", "add": "the median within the control's interval, or above"}


def made_up(folder: Path, width: int, layer: int) -> Path:
    """An SAE of random features, the first of them always active."""
    torch.manual_seed(0)
    bias = torch.zeros(WIDTH)
    bias[0] = 1e4
    point = f"layers.{layer}.resid_post"
    group = f"SAE-Res-Made-Up-W4K-L0_{K}"
    sae = TopK(
        torch.randn(WIDTH, width) / width**0.5,
        torch.randn(width, WIDTH) / WIDTH**0.5,
        bias,
        torch.zeros(width),
        K,
        point,
        Identity(group, layer, "made up"),
    )
    save_sae(sae, folder / group, layout="official")
    return folder / group


def conditions(layer: int, width: int) -> dict[str, Ask | None]:
    """What is compared, by name."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "unsteered": None,
        "unsteered again": None,
        "add": Ask(interventions=(Intervention.add(layer=layer, direction=direction, amount=0.01),)),
        "clamp, seldom active": Ask(interventions=(Intervention.clamp(layer=layer, feature=9, amount=0.01),)),
        "clamp, always active": Ask(interventions=(Intervention.clamp(layer=layer, feature=0, amount=0.01),)),
        "read, five strongest": Ask(read=Read((layer,), 5, (), Where.parse("generated")), ticket="bench"),
        "read, one feature": Ask(read=Read.from_json({"features": [f"{layer}/9"], "where": "generated"}), ticket="b"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--eager", action="store_true", help="without compilation")
    parser.add_argument("--without", action="store_true", help="without the plugin: unsteered alone")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    args = parser.parse_args()
    text = load_config(args.model).get_text_config(decoder=True)
    layer = text.num_hidden_layers // 2 if args.layer is None else args.layer
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if not args.without:
            source = str(made_up(Path(folder), text.hidden_size, layer))
            settings = ServeSettings(sae=source, layers=(layer,), feature_layers=(layer,), read_layers=(layer,))
            options = engine_arguments(settings)
        llm = LLM(
            args.model,
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=args.batch,
            enforce_eager=args.eager,
            enable_prefix_caching=False,
            **({} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 2**29, "block_size": 32}),
            **options,
        )
        measure(llm, args, conditions(layer, text.hidden_size))


def measure(llm: Any, args: argparse.Namespace, asked: dict[str, Ask | None]) -> None:
    """All conditions in turn, and their table."""
    prompts = torch.randint(100, 4000, (args.batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    if args.without:
        asked = {name: ask for name, ask in asked.items() if ask is None}

    def seconds(ask: Ask | None) -> tuple[float, float]:
        """Of the clock and of the processor."""
        extra = None if ask is None else {FIELD: ask.to_text()}
        chosen = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, extra_args=extra)
        started = time.perf_counter(), time.process_time()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], chosen, use_tqdm=False)
        if ask is not None and ask.ticket:
            llm.collective_rpc("qwen_scope_take", args=(ask.ticket,))
        return time.perf_counter() - started[0], time.process_time() - started[1]

    names = list(asked)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        seconds(asked[name])
    for turn in range(args.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(asked[name]))
        print(json.dumps({"round": turn, **{name: round(own[-1][0], 2) for name, own in times.items()}}), flush=True)
    plain = np.array(times["unsteered"])
    rows = []
    for name in names:
        own = np.array(times[name])
        clock, processor = ("{:.3f} [{:.3f}, {:.3f}]".format(*median_interval(column)) for column in (plain / own).T)
        rate = args.batch * args.new / float(np.median(own[:, 0]))
        rows.append((name, rate, clock, processor, AIMS.get(name, f"the whole interval above {AIM:.2f}")))
    kind = ", eager" * args.eager + ", a server without the plugin" * args.without
    words = (
        f"{Path(args.model).name} in bf16, an SAE of {WIDTH:,} random features at one layer, batch {args.batch},"
        f" prompts of {PROMPT} tokens and {args.new} generated, {args.rounds} rounds with the conditions in rotating"
        f" order{kind}. Share of unsteered: the median over rounds of the ratio within a round, with its 95% interval;"
        " by the clock, which others on the machine disturb, and by the seconds of the processor."
    )
    columns = (
        "condition",
        "tokens per second",
        "share of unsteered",
        "the same of processor time",
        "aim, by the clock",
    )
    made = markdown(columns, rows)
    print(f"{words}\n\n{made}")
    if args.write:
        write("serve.py", [words, "", made])


if __name__ == "__main__":
    main()
