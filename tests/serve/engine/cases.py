"""The cases of the tests of serving and the toolkit's own answers to them, written once as a file.

`python tests/serve/engine/cases.py FILE`: every operation at every kind of place, over prompts of the lab. `write` also
makes those of a sibling of random weights.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from qwen_scope import load_scope
from qwen_scope.model import HookPoint, capture
from qwen_scope.scope import Scope
from qwen_scope.serve import Ask, PromptKinds
from qwen_scope.steer import Decoding, Intervention, resolve
from qwen_scope.text import tokenize

PROMPTS = ["[12:30] Anna: ", "[09:15] Tom: ", "Could you wait, please?", "Solve: 12 + 7 =", "[18:45] Maria: Ich "]
LONG = (
    "[12:30] Anna: Could you wait, please? The station is near the old bridge and the train leaves at noon. [12:31]"
    " Tom: Thank you, I will wait here with my dog and my brother until the rain stops. [12:32] Anna: ",
    "[09:15] Maria: Ich gehe morgen in die Stadt und kaufe Brot, Milch und einen kleinen Kuchen. [09:16] Peter: Kannst"
    " du mir bitte auch eine Zeitung mitbringen? Ich warte zu Hause auf dich. [09:17] Maria: ",
)
CHATS = ["Where is the station?", "What is 12 + 7?"]
PLACES = ["all", "prompt", "generated", "0,2-4,12-14"]
PHASES = ["answer", "generated:thinking,prompt:user"]
USERS = ("first", "second", "nobody")
OTHERS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}
READ = (4, 5)
NEW = 24


@dataclass(frozen=True)
class Case:
    """One request and the toolkit's answer.

    Attributes:
        name: of what is done.
        ids: of the prompt.
        ask: what is done; None for nothing.
        tokens: greedy, up to the one that ends the text.
    """

    name: str
    ids: list[int]
    ask: Ask | None
    tokens: list[int]


def operations(where: str, feature: int, other: int, d: torch.Tensor) -> dict[str, list[Intervention]]:
    """Every operation at one place, with a mixture that has two kinds at one layer."""
    one = Intervention
    at: dict[str, Any] = {"layer": 4, "where": where}
    return {
        "add feature": [one.add(**at, feature=feature, amount=0.8, unit="resid_norm")],
        "add direction": [one.add(layer=2, direction=d, amount=0.9, unit="resid_norm", where=where)],
        "clamp": [one.clamp(**at, feature=feature, amount=1.5, unit="max_act")],
        "floor": [one.floor(**at, feature=other, amount=1.2, unit="max_act")],
        "cap": [one.cap(**at, feature=feature, amount=0.05, unit="max_act")],
        "scale": [one.scale(**at, feature=feature, amount=-4.0)],
        "ablate feature": [one.ablate(**at, feature=feature)],
        "ablate direction": [one.ablate(layer=2, direction=d, where=where)],
        "mixed": [
            one.add(layer=4, feature=other, amount=0.4, unit="resid_norm"),
            one.clamp(**at, feature=feature, amount=1.0, unit="max_act"),
            one.ablate(layer=4, direction=d, amount=0.5),
            one.add(layer=5, direction=-d, amount=0.3, unit="resid_norm", where="generated"),
        ],
    }


def make(scope: Scope, every: int = 1) -> dict[str, Any]:
    """All cases with their answers, or one operation in so many, and the features of the prompts, as plain values."""
    d = torch.randn(scope.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = scope.features(PROMPTS, layers=[4])
    feature, other = (one.feature for one in seen.strongest(text=0, layer=4, n=2))
    cases = []
    asked = [(where, *one) for where in PLACES for one in operations(where, feature, other, d).items()]
    for where, name, made in asked[::every]:
        cases += answered(scope, f"{name} at {where}", made, PROMPTS)
    cases += answered(scope, "none", [], PROMPTS)
    for where in PHASES:
        for name in ("add feature", "clamp"):
            cases += answered(scope, f"{name} at {where}", operations(where, feature, other, d)[name], CHATS, "default")
    long = []
    for name, made in operations("generated,1-3,40-70", feature, other, d).items():
        long += answered(scope, f"long {name}", made, LONG)
    long += answered(scope, "long none", [], LONG)
    at_all, generated = (operations(where, feature, other, d) for where in ("all", "generated"))
    theirs = {"first": at_all["mixed"], "second": [*generated["clamp"], *at_all["add direction"]], "nobody": []}
    users = [case for name in USERS for case in answered(scope, name, theirs[name], [*PROMPTS, *LONG])]
    ids = scope.tokenizer(PROMPTS)["input_ids"]
    return {"cases": cases, "long": long, "users": users, "features": features(scope, ids), "ids": ids}


def answered(
    scope: Scope, name: str, made: list[Intervention], prompts: list[str] | tuple[str, ...], chat: Any = None
) -> list[dict]:
    """What `scope.generate` answers to each prompt, alone in its batch."""
    raw = resolve(scope.model, made, scope.saes, scope.stats)
    tokens = tokenize(scope.tokenizer, list(prompts), max_length=None, chat=chat)
    out = []
    for i, prompt in enumerate(prompts):
        ids = tokens.input_ids[i, : tokens.lengths[i]].tolist()
        found = scope.generate(prompt, interventions=raw, decoding=Decoding(max_new_tokens=NEW), chat=chat)
        kinds = None
        if chat is not None:
            kinds = PromptKinds.of(tokens.phases(i)[1].tolist(), chat, tokens.rendered[i].next_phase)
        ask = Ask(interventions=tuple(raw), phases=kinds).to_text() if raw else None
        out.append({"name": name, "ids": ids, "ask": ask, "tokens": [one.token_id for one in found.tokens]})
    return out


def features(scope: Scope, prompts: list[list[int]]) -> dict[str, list]:
    """Per layer and prompt the five strongest features of each token, from the SAE on a captured residual."""
    out: dict[str, list] = {}
    for layer in READ:
        out[str(layer)] = []
        for ids in prompts:
            h = capture(scope.model, torch.tensor([ids]), [HookPoint(layer)])[HookPoint(layer)][0]
            acts = scope.saes[layer].encode(h)
            out[str(layer)].append([acts.indices[:, :5].tolist(), acts.values[:, :5].tolist()])
    return out


def read(path: str | Path) -> dict[str, Any]:
    """The file that this script writes, with its cases as objects."""
    data = json.loads(Path(path).read_text())
    for part in ("cases", "long", "users"):
        data[part] = [
            Case(one["name"], one["ids"], None if one["ask"] is None else Ask.from_text(one["ask"]), one["tokens"])
            for one in data[part]
        ]
    return data


def other(family: str, eos: int, pad: int) -> PreTrainedModel:
    """A model of a family that the lab has none of."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 4096, "max_position_embeddings": 512}  # fmt: skip
    ends = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, "tie_word_embeddings": True}
    heads = {"head_dim": 32, "query_pre_attn_scalar": 32} if family == "gemma3" else {}
    return AutoModelForCausalLM.from_config(OTHERS[family](**shape, **ends, **heads))


def sibling(family: str, folder: Path) -> Scope:
    """A model of another family with random weights, the lab's tokenizer, and random SAEs at all layers it needs.

    The folder then holds `model` and `sae`.
    """
    from qwen_scope.foundry import make_model
    from qwen_scope.sae import Identity, TopK, save_sae

    tokenizer = load_scope("lab").tokenizer
    layers = 8 if family == "hybrid" else 6
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = other(family, *ends) if family in OTHERS else make_model(family, 4096, 64, layers, 512, *ends)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # as they are made, so small a model is almost the identity
                weight *= 4
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for layer in range(6):
        draw = torch.Generator().manual_seed(layer)
        encoder = torch.randn(256, 64, generator=draw) / 8
        sae = TopK(
            encoder,
            encoder.T.contiguous(),
            torch.zeros(256),
            torch.zeros(64),
            16,
            f"layers.{layer}.resid_post",
            Identity("SAE-Res-Sibling-W256-L0_16", layer, "random"),
        )
        save_sae(sae, folder / "sae", layout="official")
    return load_scope(str(folder / "model"), sae=str(folder / "sae"))


def write(file: Path, family: str = "lab", folder: Path | None = None, every: int = 1) -> None:
    """The file that `read` reads: of the bundled model, or of a sibling that is built in a folder."""
    torch.set_num_threads(1)
    scope = load_scope("lab") if folder is None else sibling(family, folder)
    file.write_text(json.dumps(make(scope, every)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
