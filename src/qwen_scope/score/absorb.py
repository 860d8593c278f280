"""Feature absorption on the first letters of words, as SAEBench measures it (Chanin et al. 2024, arXiv 2409.14507).

A probe on the residual knows with which letter a word begins. The features that know it best, up to ten while each adds
0.03 to F1, are the main features of the letter. Where the probe knows the letter of a test word and they are silent,
while another feature along the probe's direction carries it, that other feature has absorbed the letter.

Random numbers are drawn in SAEBench's order, so the same residuals give its probes and main features.
"""

from __future__ import annotations

import random
import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, capture
from qwen_scope.sae import SAE
from qwen_scope.text import padded, start_ids

from .bags import Bags
from .perturb import drawn

LETTERS = string.ascii_lowercase
AFTER, EXAMPLES, SEPARATOR = " has the first letter:", 10, "\n"
WORDS, PER_LETTER, TRAIN_SHARE = 2600, 150, 0.8
FEWEST_WORDS = 400
MAIN, JUMP = 10, 0.03
"""How many main features at most, and by how much each has to raise F1."""
F1 = 0.6
"""A letter whose probe does worse on the test words is left out."""
COSINE, COSINE_FULL, SHARE, ABSORBERS = 0.1, 0.025, 0.4, 3
"""Of an absorber the cosine with the probe (for full absorption the second); the share of the residual's projection on
the probe that absorbers have to carry; how many of them count at most."""
EPOCHS, RATE, LAST_RATE = 50, 1e-2, 1e-5
EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Words:
    """Words in prompts that ask for their first letter, read at the last token of the word.

    Attributes:
        words: without their prompts.   x: residuals.   y: the letter of each, from 0.   train: how many of them train.
        weight, bias: of the letters' probes.
    """

    words: tuple[str, ...]
    x: Float[Tensor, "words d_model"]
    y: Int64[Tensor, " words"]
    train: int
    weight: Float[Tensor, "letters d_model"]
    bias: Float[Tensor, " letters"]


def vocabulary(tokenizer: PreTrainedTokenizerBase, most: int = WORDS, seed: int = 42) -> list[str]:
    """Tokens that are words of at least two Latin letters, with a space before them or not; a random part of them."""
    rng, by_letter = random.Random(seed), {letter: [] for letter in LETTERS}
    pieces = sorted(tokenizer.get_vocab())
    for piece in pieces:
        word = tokenizer.convert_tokens_to_string([piece])
        bare = word.removeprefix(" ")
        if len(bare) > 1 and bare.isascii() and bare.isalpha():
            by_letter[bare[0].lower()].append(word)
    chosen = [word for words in by_letter.values() for word in rng.sample(words, min(len(words), PER_LETTER))]
    return rng.sample(chosen, min(len(chosen), most))


def read_words(loaded: LoadedModel, point: HookPoint, words: Sequence[str], batch: int = 16, seed: int = 42) -> Words:
    """Residuals of words in prompts with ten examples, and the letters' probes.

    Raises:
        InputError: too few words, or letters of which no word is in training.
    """
    if len(words) < FEWEST_WORDS:
        raise InputError(
            f"the tokenizer has {len(words)} tokens that are words of Latin letters; absorption takes {FEWEST_WORDS}"
        )
    n = int(len(words) * TRAIN_SHARE)
    sides = [list(words[:n]), list(words[n:])]
    rng = random.Random(seed)
    prompts = [_prompt(word, rng.sample(side, EXAMPLES + 1)) for side in sides for word in side]
    start = start_ids(loaded.tokenizer)
    after = len(loaded.tokenizer(AFTER, add_special_tokens=False)["input_ids"])
    ids = [tuple(start) + tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    x, order = [torch.zeros(0)] * len(ids), sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        rows, mask = padded([ids[i] for i in some])
        h = capture(loaded.model, rows, [point], mask)[point]
        for one, i in enumerate(some):
            x[i] = h[one, len(ids[i]) - after - 1].float().cpu()
    y = torch.tensor([LETTERS.index(word.strip()[0].lower()) for word in words])
    return with_probes(tuple(words), torch.stack(x), y, n)


def with_probes(words: tuple[str, ...], x: Tensor, y: Tensor, train: int, seed: int = 42) -> Words:
    """Words with linear probes of all letters, trained on the first `train` of them."""
    with drawn(seed), torch.enable_grad():
        probe = multi_probe(x[:train], y[:train], decay=1e-4)
    return Words(words, x, y, train, probe.weight.detach(), probe.bias.detach())


def multi_probe(x: Tensor, y: Tensor, *, decay: float, l1: float = 0.0, batch: int | None = None) -> nn.Linear:
    """One probe per letter, each class as heavy as all others; `x` may be sparse.

    SAEBench takes batches of 4,096 words of a whole vocabulary; here there are eight an epoch, about as many steps.
    """
    batch = batch or max(1, -(-len(y) // 8))
    hot = nn.functional.one_hot(y, len(LETTERS)).float()
    weight = (len(hot) - hot.sum(0)) / hot.sum(0).clamp(min=1)
    loader = DataLoader(TensorDataset(torch.arange(len(y)), hot), batch_size=batch, shuffle=True)
    probe, loss_of = nn.Linear(x.shape[1], len(LETTERS)), nn.BCEWithLogitsLoss(pos_weight=weight)
    optimizer = torch.optim.Adam(probe.parameters(), lr=RATE, weight_decay=decay)
    fall = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=exp(log(LAST_RATE / RATE) / EPOCHS))
    for _ in range(EPOCHS):
        for some, target in loader:
            if x.is_sparse:
                logits = torch.sparse.mm(x.index_select(0, some), probe.weight.T) + probe.bias
            else:
                logits = probe(x[some])
            loss = loss_of(logits, target) + l1 * probe.weight.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fall.step()
    return probe


def absorption(sae: SAE, given: Words, seed: int = 42) -> dict[str, float]:
    """Means over the letters whose probe has an F1 above 0.6: the share absorbed, full absorption, and main features.

    Raises:
        InputError: there is no such letter.
    """
    from sklearn.metrics import f1_score

    n, y = given.train, given.y.numpy()
    acts = Bags(given.x, torch.ones(len(given.y), dtype=torch.long)).mean_acts(sae)
    with drawn(seed), torch.enable_grad():
        l1 = multi_probe(acts.index_select(0, torch.arange(n)), given.y[:n], decay=1e-6, l1=0.01)
    test = acts.index_select(0, torch.arange(n, len(y))).to_dense()
    said = given.x[n:] @ given.weight.T + given.bias
    cosines = torch.nn.functional.cosine_similarity(
        given.weight[:, None], sae.W_dec.detach().float().cpu().T[None], dim=-1
    )
    shares, full, mains = [], [], []
    for letter in range(len(LETTERS)):
        is_it = y[n:] == letter
        if is_it.any() and f1_score(is_it, (said[:, letter] > 0).numpy()) > F1:
            main = main_features(acts, y, n, letter, l1.weight[letter].detach())
            known = torch.from_numpy(np.flatnonzero(is_it & (said[:, letter] > 0).numpy()))
            direction = given.weight[letter] / given.weight[letter].norm()
            found = [absorbed(test[i], given.x[n + i] @ direction, cosines[letter], main) for i in known.tolist()]
            shares.append(np.mean([share for share, _ in found]))
            full.append(np.mean([whole for _, whole in found]))
            mains.append(len(main))
    if not shares:
        raise InputError("no letter is known well enough from this model's residuals to measure absorption")
    return {
        "absorbed share": float(np.mean(shares)),
        "full absorption": float(np.mean(full)),
        "main features": float(np.mean(mains)),
    }


def main_features(
    acts: Tensor, y: Int64[np.ndarray, " words"], train: int, letter: int, weight: Float[Tensor, " d_sae"]
) -> list[int]:
    """The features with the largest weights of an L1 probe, as many as raise the F1 of a regression by 0.03 each."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    ranked = weight.topk(MAIN).indices
    x, is_it, best, kept = acts.index_select(1, ranked).to_dense().numpy(), y == letter, -100.0, []
    for k in range(1, MAIN + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(max_iter=500, class_weight="balanced").fit(x[:train, :k], is_it[:train])
        f1 = f1_score(is_it[train:], model.decision_function(x[train:, :k]) > 0)
        if f1 <= best + JUMP:
            break
        best, kept = f1, ranked[:k].tolist()
    return kept


def absorbed(
    acts: Float[Tensor, " d_sae"], projection: Tensor, cosines: Float[Tensor, " d_sae"], main: Sequence[int]
) -> tuple[float, bool]:
    """Of one word the share of a letter that others than its main features carry, and whether one of them has it all.

    Args:
        projection: of the residual on the unit direction of the probe.   cosines: of decoder directions with it.
    """
    along, whole = acts * cosines, float(projection)
    chosen = list(main)
    mine = float(along[chosen].sum())
    others = torch.ones(len(acts), dtype=torch.bool)
    others[chosen] = False
    others &= (cosines >= COSINE) & (along > 0)
    some = along[others]
    theirs = float(some.topk(min(ABSORBERS, len(some))).values.sum())
    if mine >= whole or theirs / whole < SHARE:
        share = 0.0
    elif mine <= 0:
        share = 1.0
    else:
        taken = min(theirs, whole - mine)
        share = float(np.clip(taken / (taken + mine), 0, 1))
    top = int(along.argmax())
    silent = bool((acts[chosen].abs() < EPS).all())
    return share, bool(silent and cosines[top] >= COSINE_FULL and whole >= 0 and float(along[top]) / whole >= SHARE)


def _prompt(word: str, examples: Sequence[str]) -> str:
    """Ten examples with their answers, and the word that is asked for."""
    shown = [one for one in examples if one != word][:EXAMPLES]
    return SEPARATOR + SEPARATOR.join([*(f"{one}{AFTER} {one.strip()[0].upper()}" for one in shown), f"{word}{AFTER}"])
