"""Hostile files, texts and options, drawn by number: each is a command line and what it finds in its folder."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hostile_sae
import torch
from safetensors.torch import save_file

JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"9" * 4301,
    b'{"version": ' + b"9" * 4301 + b"}",
    b'{"version": 1e309}',
    b'{"version": NaN}',
    b'{"version": true}',
    b'"\\ud800"',
    b'{"version": 1, "version": 1}',
    b"\x00" * 50,
    b'{"layers": [[[[]]]], "k": -1}',
    '{"\u202e\x1b[31m": 1}'.encode(),
    b'{"model_type": "\\u001b[2J"}',
    b'{"k": "\\u0669", "activation_fn": {}}',
    b'{"version": 1}\n{"version": 1}',
]
YAML = [
    b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    b"!!python/object/apply:os.system [true]",
    b"version: 2024-01-01\n",
    b"version: 1\nname: 12:30:45\n",
    b"\t- x",
    b"%YAML 9.9\n---\n",
    b"version: " + b"1" * 4301,
    b"? [a]\n: b\n",
    b"&a [*a]",
    b"version: !!binary aGk=\n",
    b"- " * 3000,
    b"version: 1\ninterventions: [~]\n",
    b"\xff\xfe",
]
TEXTS = [
    "",
    " ",
    "\n" * 5,
    "\x00",
    "\x1b[2J\x1b[31m",
    "\u200b" * 300,
    "e" + "\u0301" * 100_000,
    "\ud800",
    "a\udcffb",
    "\ufeff",
    "\u202e\u2066abc",
    "𝟙𝟚𝟛",
    "🙂" * 5000,
    "a" * 70_000,
    "<|im_end|>" * 200,
    "\r\r\n\v\f\x1c\x85\u2028",
    "٣٤٥",
    "ﷺ" * 999,
    "%s%n{0}",
    "[bold]x[/bold]",
    "x\ty" * 999,
    "\U0010ffff",
    "-",
    "--help",
    "'; DROP TABLE x;--",
]
VALUES = [
    "NaN",
    "-1",
    "1e309",
    "inf",
    "9" * 4301,
    "9" * 30,
    "٣",
    "",
    " ",
    "0",
    "1.5",
    "0x10",
    "1_000",
    "true",
    "a\nb",
    "\x1b[31m",
    "-9223372036854775809",
    "2147483648",
    "½",
    "²",
    "1,2",
    "0-",
    "3-1",
    "0-9999999999",
    "layer2",
    "[]",
    "../../x",
    "\udcff",
]
ROWS = [
    b'{"text": "a fine line"}',
    b'{"text": ""}',
    b'{"text": null}',
    b'{"text": 5}',
    b'{"text": ["a", 1]}',
    b"{}",
    b"[1]",
    b'{"text": {"a": 1}}',
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b"{broken",
    b'{"text": ' + b"9" * 4301 + b"}",
    b"[" * 50_000,
    b'{"text": [{"role": "user", "content": null}]}',
    b'{"text": [{"role": "user"}]}',
    b"\x00\x00",
    b"null",
    b'{"text": "x", "text": "y"}',
    b'{"text": "\\u0000\\u001b[31m"}',
    b'{"text": [{"role": "user", "content": "hi"}]}',
    '{"text": "\u2028 line \u0085"}'.encode(),
    b'{"text": "x", "' + b"k" * 5000 + b'": 1}',
    b'{"text": 1e999}',
    b'"text"',
]
CSV = [
    b"",
    b"text\n",
    b'text\n"',
    b"text,text\na,b\n",
    b"a,b\n1\n",
    b"text\n" + b"x" * 200_000 + b"\n",
    b"text\n\x00\n",
    b"\xff\xfet\x00e\x00x\x00t\x00",
    b'text\n"a\nb"\n',
    b"text\n" + b'"' + b"y" * 150_000,
    b";;;\n",
    b"text\n\xff\n",
    b"\xef\xbb\xbftext\nfine\n",
    b"text\r\nfine\r\n\r\n",
    b'"te\nxt"\nx\n',
    b"text\n" + b"," * 100_000,
]
NAMES = [
    "a\nb",
    "\x1b[31mred",
    "\u202ecod.exe",
    "a" * 300,
    "..",
    "~nobody",
    "a/b/c/d",
    "http://x",
    "con:",
    "x\udcff",
    " ",
    "-o",
]
SAMPLE = b'{"text": "Where is the station?"}\n{"text": "Guten Morgen"}\n{"text": "def add(a, b)"}\n'

Case = tuple[list[str], bool]  # the command line, and whether it names an output `out` that is whole or absent


class World:
    """What cases begin with: a tiny model, its SAEs, a store of a few texts, a rule and a recipe; all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.sae, self.store = folder / "model", folder / "sae", folder / "store"
        self.rule, self.recipe = folder / "rule.json", folder / "recipe.json"

    @property
    def options(self) -> list[str]:
        return ["--model", str(self.model), "--sae", str(self.sae)]


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file cut, flipped, filled, doubled or emptied."""
    how, at = rng.randrange(6), rng.randrange(1, max(2, len(data)))
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([data[at % len(data)] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if how == 2:
        return data[:at] + bytes(rng.randrange(256) for _ in range(40)) + data[at + 40 :]
    if how == 3:
        return data + data
    return b"" if how == 4 else gzip.compress(data)


def sae_file(world: World, here: Path, rng: random.Random) -> Case:
    """A hostile weights file of the kinds that `test_sae_files` knows, or a good one that is damaged."""
    makers = [f for name, f in vars(hostile_sae).items() if name.startswith(("pt_", "st_", "bad_")) and callable(f)]
    good = next(p for p in world.sae.iterdir() if p.suffix in (".pt", ".safetensors"))
    folder = here / "sae"
    folder.mkdir()
    for one in world.sae.iterdir():
        shutil.copy(one, folder)
    write(folder / good.name, damaged(good.read_bytes(), rng))
    assert makers is not None
    return ["features", "hello", "--model", str(world.model), "--sae", str(folder), "--layer", "0"], False


def sae_layout(world: World, here: Path, rng: random.Random) -> Case:
    """An SAE of another tool with a config, names or types that do not fit."""
    tensors = hostile_sae.good()
    names = [
        ("sae_weights.safetensors", "cfg.json"),
        ("sae.safetensors", "cfg.json"),
        ("layer0.sae.safetensors", "config.json"),
        ("sae_L1_latest.safetensors", "sae_L1_cfg.json"),
        ("layer0-00001-of-00002.safetensors", "config.json"),
        ("ae.pt", "config.json"),
        ("layer_0.pt", "config.json"),
        ("weights.npz", "config.json"),
    ]
    weights, config = rng.choice(names)
    if rng.random() < 0.5:
        tensors[rng.choice(["W_enc", "\x1b[31mW", "threshold", "b_enc"])] = rng.choice(
            [torch.zeros(3), torch.full((24,), float("nan")), torch.ones(2, 2, 2), torch.zeros(0), torch.ones(24).int()]
        )
    place = here / "sae" / weights
    place.parent.mkdir()
    if place.suffix == ".pt":
        torch.save(
            rng.choice([tensors, list(tensors), {"x": 1}, 5, {"a": {"b": tensors}}, {"state": tensors, "scale": 1}]),
            place,
        )
    else:
        save_file({k: v.clone() for k, v in tensors.items()}, place)
    write(place.parent / config, rng.choice([*JSON, b'{"d_in": "8", "d_sae": [24]}', b'{"k": 1e400}', b'{"k": 4}']))
    return ["convert", str(place.parent), "-o", str(here / "out")], True


def recipe(world: World, here: Path, rng: random.Random) -> Case:
    kind = rng.choice([".json", ".yaml", ".yml", ".txt"])
    good = json.loads(world.recipe.read_text())
    if rng.random() < 0.5:
        good[rng.choice(list(good))] = rng.choice(
            [None, 1e308, [], {"a": {}}, "\x1b[31m", -1, True, [[1]], [{}], "9" * 5000]
        )
        data = json.dumps(good).encode()
    else:
        data = rng.choice(YAML if "y" in kind else JSON)
    path = write(here / f"r{kind}", data)
    return ["steer", "hello", *world.options, "--recipe", path, "--max-new-tokens", "2"], False


def rule(world: World, here: Path, rng: random.Random) -> Case:
    if world.rule.exists() and rng.random() < 0.5:
        good = json.loads(world.rule.read_text())
        good[rng.choice(list(good))] = rng.choice([None, 1e308, [], {"a": {}}, "\x1b[31m", -1, True, [[1]], [{}]])
        data = json.dumps(good).encode()
    else:
        data = rng.choice(JSON)
    corpus = write(here / "c.jsonl", SAMPLE)
    return [
        "classify",
        "predict",
        write(here / "rule.json", data),
        corpus,
        *world.options,
        "-o",
        str(here / "out.jsonl"),
    ], True


def store(world: World, here: Path, rng: random.Random) -> Case:
    """A store with one of its files damaged."""
    place = here / "store"
    shutil.copytree(world.store, place)
    target = rng.choice(sorted(p for p in place.rglob("*") if p.is_file()))
    data = rng.choice(JSON) if target.suffix == ".json" and rng.random() < 0.6 else damaged(target.read_bytes(), rng)
    target.write_bytes(data)
    command = rng.choice(
        [
            ["store"],
            ["store", "--layer", "0", "-f", "1"],
            ["store", "--verify"],
            ["find", "--positive", "id=1"],
            ["show", "--layer", "0", "-f", "1", "--no-model"],
            ["analyze", "redundancy"],
        ]
    )
    at = 2 if command[0] == "analyze" else 1
    return [*command[:at], str(place), *command[at:], *(["--layer", "0"] if command[0] == "analyze" else [])], False


def notes(world: World, here: Path, rng: random.Random) -> Case:
    place = here / "store"
    shutil.copytree(world.store, place)
    write(place / "notes.jsonl", rng.choice([*JSON, *ROWS]) + rng.choice([b"", b"\n", b"\n\n{"]))
    return ["find", str(place), "--label", rng.choice(["x", "", "\x1b"])], False


def corpus_file(here: Path, rng: random.Random) -> str:
    kind = rng.choice([".jsonl", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".txt.gz", ".ndjson"])
    if "jsonl" in kind or "ndjson" in kind:
        data = b"\n".join(rng.choice(ROWS) for _ in range(rng.choice([1, 3, 12])))
    elif kind in (".csv", ".tsv"):
        data = rng.choice(CSV)
    elif kind == ".parquet":
        data = rng.choice([b"", b"PAR1", b"PAR1" + b"\x00" * 50 + b"PAR1", SAMPLE])
    else:
        data = "\n\n".join(rng.choice(TEXTS) for _ in range(3)).encode("utf-8", "surrogatepass")
    if kind.endswith(".gz"):
        zipped = gzip.compress(data)
        data = rng.choice([zipped, zipped, zipped[: len(zipped) // 2], data, b"\x1f\x8b", zipped + b"junk"])
    return write(here / f"c{kind}", data)


def extracted(world: World, here: Path, rng: random.Random) -> Case:
    return ["extract", corpus_file(here, rng), *world.options, "-o", str(here / "out")], True


def trained(world: World, here: Path, rng: random.Random) -> Case:
    source = corpus_file(here, rng)
    return [
        "train",
        source,
        "--model",
        str(world.model),
        "--layers",
        "0",
        "--d-sae",
        "64",
        "--k",
        "4",
        "--tokens",
        "64",
        "--batch",
        "32",
        "--context-length",
        "16",
        "--batch-size",
        "2",
        "--eval-tokens",
        "0",
        "-o",
        str(here / "out"),
    ], False


def fitted(world: World, here: Path, rng: random.Random) -> Case:
    good = write(here / "good.txt", b"one\n\ntwo\n\nthree\n\nfour\n\nfive\n\nsix")
    sides = [corpus_file(here, rng), good]
    rng.shuffle(sides)
    return ["classify", "fit", *sides, *world.options, "-r", str(here / "out.json")], True


def compared(world: World, here: Path, rng: random.Random) -> Case:
    sides = [corpus_file(here, rng), write(here / "good.txt", b"one\ntwo\nthree\nfour")]
    return ["find", "--positive", sides[0], "--negative", sides[1], *world.options, "--layer", "0"], False


def tokenizer(world: World, here: Path, rng: random.Random) -> Case:
    """A model folder whose tokenizer or config is not what it should be."""
    place = here / "model"
    shutil.copytree(world.model, place)
    target = place / rng.choice(
        ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"]
    )
    if target.suffix == ".json" and target.exists() and rng.random() < 0.7:
        good = json.loads(target.read_text())
        key = rng.choice(
            [
                *good,
                "normalizer",
                "pre_tokenizer",
                "post_processor",
                "model",
                "auto_map",
                "quantization_config",
                "rope_scaling",
                "rope_parameters",
                "chat_template",
                "num_hidden_layers",
            ]
        )
        good[key] = rng.choice(
            [
                {"type": "FutureThing"},
                None,
                [],
                -1,
                1e308,
                "\x1b[31m",
                {"quant_method": "gptq", "bits": 4},
                {"rope_type": "new", "factor": 2.0},
                {"quant_method": "awq"},
                {"quant_method": "hqq"},
                {"quant_method": "bitsandbytes", "load_in_4bit": True},
                {"group_size": 64, "bits": 4},
                {"quant_method": "compressed-tensors"},
                "{{ raise_exception('no') }}",
                "{% for %}",
                [{"name": "tool", "template": "x"}],
                "llama",
                10**30,
            ]
        )
        target.write_text(json.dumps(good))
    elif target.suffix == ".json":
        write(target, rng.choice(JSON))
    else:
        write(target, damaged(target.read_bytes(), rng))
    chat = rng.choice([[], ["--chat", "default"], ["--chat", "thinking"]])
    return ["features", "hello", "--model", str(place), "--sae", str(world.sae), "--layer", "0", *chat], False


def text(world: World, here: Path, rng: random.Random) -> Case:
    given, other = rng.choice(TEXTS), rng.choice(TEXTS)
    command = rng.choice(
        [
            ["features", given],
            ["features", given, "--json"],
            ["features", "hi", "--response", given],
            ["compare", given, other],
            ["steer", given, "--feature", "0/1", "--amount", "2", "--max-new-tokens", "2"],
            ["features", given, "--chat", "default", "--truncate"],
            ["find", "--promotes", given, "--layer", "0"],
        ]
    )
    if any("\x00" in word for word in command):
        return [*command[:1], "--", *command[1:2], *world.options] if len(command) == 2 else [
            *command,
            *world.options,
        ], False
    return [*command, *world.options], False


def option(world: World, here: Path, rng: random.Random) -> Case:
    value = rng.choice(VALUES)
    store, w = str(world.store), world.options
    command = rng.choice(
        [
            ["features", "hi", *w, "--layer", value],
            ["features", "hi", *w, "--layers", value],
            ["features", "hi", *w, "--top", value],
            ["features", "hi", *w, "--dtype", value],
            ["features", "hi", *w, "--device", value],
            ["compare", "a", "b", *w, "--top", value],
            ["steer", "hi", *w, "--feature", f"0/{value}", "--amount", "1"],
            ["catalog", value],
            ["plan", value],
            ["steer", "hi", *w, "--feature", "0/1", "--amount", value, "--max-new-tokens", "2"],
            ["steer", "hi", *w, "--feature", "0/1", "--amount", "1", "--max-new-tokens", value],
            [
                "steer",
                "hi",
                *w,
                "--layer",
                "0",
                "--feature",
                "1",
                "--amount",
                "1",
                "--where",
                value,
                "--max-new-tokens",
                "1",
            ],
            ["store", store, "--layer", "0", "-f", value],
            ["store", store, "--layer", value],
            ["store", store, "--sql", value],
            ["store", store, "-n", value, "--layer", "0"],
            ["store", store, "--how", value, "--layer", "0", "-f", "1"],
            ["find", store, "--positive", value],
            ["find", store, "--groups", value],
            ["find", "--near", value, *w],
            ["find", store, "--positive", f"id={value}", "--level", value],
            ["show", store, "--layer", "0", "-f", value, "--no-model"],
            ["analyze", "redundancy", store, "--layer", value],
            ["convert", value, "-o", str(here / "out")],
            ["convert", str(world.sae), "-o", str(here / "out"), "--layout", value],
            ["features", "hi", "--model", value],
            ["extract", str(world.folder / "c.jsonl"), *w, "-o", str(here / "out"), "--sample", value],
            ["extract", str(world.folder / "c.jsonl"), *w, "-o", str(here / "out"), "--batch", value],
            ["extract", str(world.folder / "c.jsonl"), *w, "-o", str(here / "out"), "--max-tokens", value],
            ["extract", str(world.folder / "c.jsonl"), *w, "-o", str(here / "out"), "--column", value],
            ["eval", value, "--model", str(world.model)],
            ["export", store, "--layer", value],
            ["posttrain", "eval", value],
            [
                "train",
                "lab",
                "--model",
                str(world.model),
                "-o",
                str(here / "o"),
                "--d-sae",
                value,
                "--k",
                "4",
                "--tokens",
                "64",
            ],
            [
                "train",
                "lab",
                "--model",
                str(world.model),
                "-o",
                str(here / "o"),
                "--d-sae",
                "64",
                "--k",
                value,
                "--tokens",
                "64",
            ],
            [
                "train",
                "lab",
                "--model",
                str(world.model),
                "-o",
                str(here / "o"),
                "--d-sae",
                "64",
                "--k",
                "4",
                "--tokens",
                value if len(value) > 6 or not value.isdigit() else "-3",
            ],
        ]
    )
    return command, False


def path(world: World, here: Path, rng: random.Random) -> Case:
    name, good = rng.choice(NAMES), write(here / "c.jsonl", SAMPLE)
    (here / "folder").mkdir()
    command = rng.choice(
        [
            ["extract", name, *world.options, "-o", str(here / "out")],
            ["extract", good, *world.options, "-o", name],
            ["extract", good, *world.options, "-o", "/proc/x"],
            ["extract", good, *world.options, "-o", good],
            ["convert", name, "-o", name],
            ["convert", str(world.sae), "-o", "/dev/full"],
            ["store", name],
            ["show", name],
            ["classify", "predict", name, good, *world.options],
            ["analyze", "redundancy", name, name],
            ["features", "x", "--sae", name],
            ["steer", "hi", *world.options, "--recipe", name],
            ["features", "x", "--model", name],
            ["train", name, "-o", name, "--d-sae", "64", "--k", "4", "--tokens", "64"],
            ["show", str(world.store), "--layer", "0", "-f", "1", "--no-model", "--html", "/dev/full"],
            ["show", str(world.store), "--layer", "0", "-f", "1", "--no-model", "--html", str(here / "folder")],
            ["find", "--positive", name, "--negative", name, *world.options],
        ]
    )
    return command, False


FAMILIES: tuple[Callable[[World, Path, random.Random], Case], ...] = (
    sae_file,
    sae_layout,
    recipe,
    rule,
    store,
    notes,
    extracted,
    trained,
    fitted,
    compared,
    tokenizer,
    tokenizer,
    text,
    text,
    option,
    option,
    option,
    path,
)


def case(number: int, seed: int, world: World, here: Path) -> tuple[str, list[str], bool]:
    """The case of a number: its family, its command line, and whether its output `out` is whole or absent."""
    make = FAMILIES[number % len(FAMILIES)]
    words, whole = make(world, here, random.Random(f"{seed}/{number}"))
    assert sys.getrecursionlimit() < 10_000
    return make.__name__, words, whole
