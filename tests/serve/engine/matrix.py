"""One cell of the matrix of serving: a family of models, a model runner, a way of compiling, a number of workers.

    tests/serve/run.sh matrix [--family moe] [--runner v1|v2] [--mode eager|inductor|piecewise] [--tp 1|2] [--every 6]

Every case of cases.py is asked at once and in chunks with preemption; then the features of the prompts are read, and a
watch marks, stops and switches. Prints one line of JSON; the exit code is 1 if an answer is not the toolkit's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAMILIES = ("lab", "moe", "hybrid", "llama", "qwen2", "gemma3")


def force_piecewise() -> dict[str, Any]:
    """Compile as a server on a GPU does, in pieces, but for CUDA graphs; the options of vLLM for it."""
    import vllm.platforms.cpu as cpu  # pyright: ignore[reportMissingImports]
    from vllm.compilation.passes.utility.fix_functionalization import (  # pyright: ignore[reportMissingImports]
        FixFunctionalizationPass,
    )
    from vllm.config import CompilationMode  # pyright: ignore[reportMissingImports]

    update = cpu.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        update(cls, config)
        if config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE:
            config.compilation_config.mode = CompilationMode.VLLM_COMPILE

    cpu.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    # It names operations that CUDA's build has; inductor takes ours apart by itself.
    FixFunctionalizationPass.__call__ = lambda self, graph: None
    passes = ("fuse_rope_kvcache_cat_mla", "fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "fuse_allreduce_rms")
    return {"compilation_config": {"compile_sizes": [], "pass_config": dict.fromkeys(passes, False)}}


def count_preemptions() -> list[str]:
    """A list that grows by the name of each request that is preempted, where the scheduler is in this process."""
    from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]

    names, preempt = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = counted
    return names


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="lab", choices=FAMILIES)
    parser.add_argument("--runner", default="v1", choices=("v1", "v2"))
    parser.add_argument("--mode", default="eager", choices=("eager", "inductor", "piecewise"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="one case of so many")
    args = parser.parse_args()
    started = time.monotonic()
    if args.tp > 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    import cases

    work, file = Path(os.environ["QWEN_SCOPE_CASES"]).parent / args.family, Path(os.environ["QWEN_SCOPE_CASES"])
    if args.family != "lab":
        file = work / f"cases-{args.every}.json"
        if not file.exists():
            work.mkdir(exist_ok=True)
            cases.write(file, args.family, work, args.every)  # before vLLM is here
    known = cases.read(file)
    if args.runner == "v2":
        __import__("v2shim")
    import served

    if args.family == "hybrid":
        __import__("gdnshim")

    from qwen_scope.serve import Ask, Read, ServeSettings
    from qwen_scope.steer import Where

    model, sae = ((served.LAB if args.family == "lab" else work) / part for part in ("model", "sae"))
    options: dict[str, Any] = {"enforce_eager": args.mode == "eager", "tensor_parallel_size": args.tp}
    if args.mode == "piecewise":
        options |= force_piecewise()
    preempted = count_preemptions() if args.tp == 1 else []
    settings = ServeSettings(
        sae=str(sae), layers=tuple(range(6)), feature_layers=(2, 4), read_layers=cases.READ, rows=16
    )
    llm = served.start(
        settings,
        model,
        max_num_batched_tokens=64,
        max_num_seqs=12,
        kv_cache_memory_bytes=(3 if args.family == "hybrid" else 2) * 2**20,
        **options,
    )
    asked = [*known["cases"][:: args.every if args.family == "lab" else 1], *known["long"]]
    bad = served.wrong(llm, asked)
    again = served.wrong(llm, known["long"])
    read = Ask(read=Read(cases.READ, 5, (), Where.parse("prompt")), ticket="one")
    out = served.answers(llm, known["ids"], [served.params(read, n=3) for _ in known["ids"]])
    found = llm.collective_rpc("qwen_scope_take", args=("one",))
    served.check_watches(llm, known)
    rows = [served.compare_features(known, one, [each.request_id for each in out]) for one in found]
    print(
        json.dumps(
            vars(args)
            | {"cases": len(asked), "wrong": len(bad), "wrong_from_cache": len(again), "names": (bad + again)[:8]}
            | {"feature_rows": rows, "preempted": len(preempted), "seconds": round(time.monotonic() - started)}
        ),
        flush=True,
    )
    if bad or again or not all(rows) or len(rows) != args.tp:
        return 1
    # The scheduler of two workers is in another process; a state of Qwen3.5 is one block, so hardly anything is short.
    return 0 if preempted or args.tp > 1 or args.family == "hybrid" else 1


if __name__ == "__main__":
    sys.exit(main())
