"""The examples at the end of every command's help; tests run them in this order, in one folder, on the lab."""

from __future__ import annotations

import re

WIDTH = 77  # of a line, behind two spaces of indentation

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("qwen-scope demo", 'qwen-scope demo "Guten Morgen, du Esel!"'),
    "lab examples": ("qwen-scope lab examples -o out/examples",),
    "lab texts": ("qwen-scope lab texts -n 2 --language ja --register archaic",),
    "lab card": ("qwen-scope lab card",),
    "lab build": ("qwen-scope lab build -o out/lab --small",),
    "lab panel": ("qwen-scope lab panel -o out/panel",),
    "catalog": ("qwen-scope catalog", "qwen-scope catalog SAE-Res-Qwen3-8B-Base-W64K-L0_50"),
    "plan": (
        "qwen-scope plan SAE-Res-Qwen3-8B-Base-W64K-L0_50 --device-memory 24GB",
        "qwen-scope plan lab --train",
    ),
    "features": (
        'qwen-scope features "Could you wait, please? Shut up, you fool!"',
        'qwen-scope features "Wie geht es dir?" --chat non_thinking --response "Halt die Klappe, du Esel!" --layers 4',
        'qwen-scope features "The capital of France is" --layers 14 --dtype bfloat16 --model Qwen/Qwen3-1.7B-Base'
        " --sae Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
    ),
    "compare": ('qwen-scope compare "Where is the station?" "Wo ist der Bahnhof?" --drop-common',),
    "why": (
        'qwen-scope why "Guten Morgen, wo ist" --token " der" --against " the"',
        'qwen-scope why "Guten Morgen, wo ist" --token " der" --against " the" --layers 1-5 --recipe out/why.json',
        'qwen-scope why "Guten Morgen, wo ist" --nodes 60 --html out/why.html --graph out/graph.json',
    ),
    "lens fit": ("qwen-scope lens fit lab -o out/lens.pt --prompts 2 --length 48 --layers 2-4",),
    "extract": (
        "qwen-scope extract lab -o out/store --layers 5 --sample 200",
        "qwen-scope extract out/examples/corpus.jsonl -o out/corpus --layers 5",
        "qwen-scope extract lab -o out/share-1 --layers 5 --sample 20 --share 1/2",
        "qwen-scope extract lab -o out/share-2 --layers 5 --sample 20 --share 2/2",
    ),
    "store show": ("qwen-scope store out/store", "qwen-scope store out/store --feature 5/678 -n 3"),
    "store merge": ("qwen-scope store merge out/share-1 out/share-2 -o out/merged",),
    "find": (
        "qwen-scope find --positive lab:language=de --negative lab:language=fr --documents 20 --layers 5 -n 3",
        "qwen-scope find --positive out/examples/rude.txt --negative out/examples/polite.txt --layers 5 -n 3",
        "qwen-scope find out/store --groups language -n 1",
    ),
    "show": (
        "qwen-scope show out/store --feature 5/678 -n 5",
        "qwen-scope show out/store --feature 5/678 -n 5 --html out/german.html",
    ),
    "card": (
        "qwen-scope card out/store 5/678 -n 3",
        "qwen-scope card out/store 5/678 --other lab@4 --html out/card.html",
    ),
    "match": (
        "qwen-scope match lab lab --layer 4 --other-layer 5 -n 5",
        "qwen-scope match out/store lab --layer 5 --other-layer 4",
    ),
    "label": ("qwen-scope label out/store --features 5/678",),
    "export": ("qwen-scope export out/store --to statistics -o out/statistics.csv",),
    "explore": ("qwen-scope explore", "qwen-scope explore --store out/store --port 7861"),
    "steer": ('qwen-scope steer "[12:30] Anna: " --feature 4/283 --amount 0.5',),
    "serve": (
        "qwen-scope serve lab --layers 0-5 --feature-layers 4 --read-layers 4 --dry-run -- --port 8000",
        "qwen-scope serve Qwen/Qwen3-1.7B-Base --sae Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 --feature-layers 14"
        " --recipes recipes -- --max-model-len 8192",
    ),
    "classify fit": (
        "qwen-scope classify fit out/examples/rude.txt out/examples/polite.txt --layers 4,5 --rule out/rude.json",
        "qwen-scope classify fit out/examples/german.txt out/examples/others.txt --layers 5 --top 1 --fpr 0.01"
        " --rule out/german.json",
    ),
    "classify predict": ("qwen-scope classify predict out/rude.json out/examples/corpus.jsonl --out out/labels.jsonl",),
    "classify distil": (
        "qwen-scope classify distil out/rude.json out/examples/corpus.jsonl --student out/rude-student.json",
    ),
    "classify transfer": (
        "qwen-scope classify transfer out/examples/corpus.jsonl --positive register=rude --groups language"
        " --layers 5 --out out/transfer",
    ),
    "sweep": (
        "qwen-scope sweep out/examples/prompts.txt --feature 5/678 --rule out/german.json --sample"
        " --max-perplexity 3 --save-recipe out/german.yaml",
    ),
    "validate": (
        "qwen-scope validate out/examples/prompts.txt --recipe out/german.yaml --rule out/german.json"
        " --sample --max-new-tokens 8 --positive out/examples/german.txt"
        " --negative out/examples/french.txt --unrelated out/examples/others.txt",
    ),
    "analyze redundancy": ("qwen-scope analyze redundancy out/a out/b --out out/report",),
    "analyze overlap": ("qwen-scope analyze overlap out/a out/b",),
    "analyze subset": ("qwen-scope analyze subset out/a",),
    "analyze drift": ("qwen-scope analyze drift out/a out/b",),
    "analyze clusters": ("qwen-scope analyze clusters out/a --shuffles 5",),
    "train": (
        "qwen-scope train lab -o out/run --layers 4 --d-sae 512 --k 16 --tokens 100000 --batch 1024 --eval-tokens 8192",
    ),
    "posttrain prepare": ("qwen-scope posttrain prepare lab --target zh --layers 5 --sample 200 -o out/table.json",),
    "posttrain sft": (
        "qwen-scope posttrain sft lab --sample 64 --table out/table.json --weight 0.5 --batch 8 --accumulate 1"
        " --warmup 0 -o out/sft",
    ),
    "posttrain eval": (
        "qwen-scope posttrain eval lab --groups ar,ko,ru -n 6 --script CJK --samples 2 --max-new-tokens 24"
        " --model out/sft/model",
    ),
    "posttrain repetition": ("qwen-scope posttrain repetition lab --layers 5 -n 100 -o out/loops.json",),
    "posttrain rl": ("qwen-scope posttrain rl lab --recipe out/loops.json --held-out lab -o out/rl",),
    "synthesize": (
        "qwen-scope synthesize lab --sample 10 --store out/store -f 3,17 --strength 0.9 --budget 6 --writer lab"
        " -o out/more",
        "qwen-scope synthesize lab --sample 10 --store out/store -f 3,17 --dry-run --price-in 2.5 --price-out 10"
        " -o out/more",
    ),
    "eval": ("qwen-scope eval lab --layers 4 --tokens 8192",),
    "score": (
        "qwen-scope score lab lab --layers 4 --dry-run -o out/score",
        "qwen-scope score lab lab --layers 4 --tokens 4096 --train-tokens 50000 --batch 1024 -o out/score",
    ),
    "convert": ("qwen-scope convert lab --layers 4 --layout sae_lens -o out/sae_lens",),
}


def broken(line: str) -> list[str]:
    """A command as lines of at most `WIDTH` columns, broken between words as a shell reads them."""
    out: list[str] = []
    for word in re.findall(r"(?:\"[^\"]*\"|'[^']*'|[^\s])+", line):
        if out and len(out[-1]) + len(word) + 3 <= WIDTH:  # the last two columns hold a space and a backslash
            out[-1] += f" {word}"
        else:
            out.append(f"    {word}" if out else word)
    return [f"{part} \\" for part in out[:-1]] + out[-1:]
