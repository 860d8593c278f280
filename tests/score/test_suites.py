"""Suites of a scoreboard restated with dense arithmetic on residuals that are made here, and their planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.sae import TopK
from qwen_scope.score import Bags, ColumnData, contrast, read_bags, scr, steering_loss, tpp, train_probes
from qwen_scope.score.absorb import LETTERS, absorbed, absorption, with_probes
from qwen_scope.score.perturb import BOTH, OTHER, SPURIOUS, WANTED, Probes, spurious
from qwen_scope.score.steered import Reading
from qwen_scope.text import Counted, Document

D, F = 16, 24


def bags(x: torch.Tensor, length: int = 3, seed: int = 0) -> Bags:
    """Texts of one length whose tokens lie around the given means."""
    noise = torch.randn(len(x), length, x.shape[1], generator=torch.Generator().manual_seed(seed)) / 10
    return Bags((x[:, None] + noise).flatten(0, 1), torch.full((len(x),), length))


def truth(directions: torch.Tensor) -> TopK:
    """An SAE whose features are the given unit rows, and read along them."""
    n, d = directions.shape
    return TopK(directions.clone(), directions.T.contiguous(), torch.zeros(n), torch.zeros(d), k=n)


def orthonormal(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed)))[0].T.contiguous()


def random_sae(seed: int = 3) -> TopK:
    g = torch.Generator().manual_seed(seed)
    W = nn.functional.normalize(torch.randn(F, D, generator=g), dim=-1)
    return TopK(W, W.T.contiguous(), torch.zeros(F), torch.zeros(D), k=5)


def random_directions(n: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(5)), dim=-1)


def drawn_texts(n: int, directions: torch.Tensor, seed: int) -> torch.Tensor:
    """Mean residuals in which each direction has a random positive strength."""
    return torch.rand(n, len(directions), generator=torch.Generator().manual_seed(seed)) @ directions


def test_means_of_bags_are_those_of_each_text() -> None:
    one = Bags(torch.randn(7, D), torch.tensor([3, 4]))
    sae = random_sae()
    dense = sae.encode(one.h).to_dense()
    torch.testing.assert_close(one.means(), torch.stack([one.h[:3].mean(0), one.h[3:].mean(0)]))
    torch.testing.assert_close(one.mean_acts(sae).to_dense(), torch.stack([dense[:3].mean(0), dense[3:].mean(0)]))


@pytest.fixture(scope="module")
def classes() -> tuple[torch.Tensor, Probes]:
    """Five classes, each with a direction of its own, and three directions that belong to none."""
    directions = orthonormal(8)
    sides = []
    for seed in (0, 1):
        side = {}
        for i, name in enumerate("abcde"):
            x = drawn_texts(200, directions[5:], seed * 10 + i) + 2 * directions[i]
            side[name] = bags(x, 2, seed=seed * 10 + i)
        sides.append(side)
    return directions, train_probes(*sides, None)


def test_ablated_probes_see_what_decoding_every_token_gives(classes: tuple[torch.Tensor, Probes]) -> None:
    """The effect of every feature and the perturbed accuracy, written out with dense activations of each token."""
    _, given = classes
    sae, n, name = random_sae(), 4, "a"
    found = tpp(sae, given, (n,))[f"tpp {n}"]
    dense = {one: sae.encode(some.h).to_dense() for one, some in given.test.items()}
    scores = []
    with torch.random.fork_rng():
        torch.set_rng_state(given.state)

        def sides(of: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
            """As many of all others as of the class: what SAEBench draws, in its order."""
            mine = of[name]
            rest = torch.cat([of[o][torch.randperm(len(of[o]))[: -(-len(mine) // 4)]] for o in of if o != name])
            x = torch.cat([mine, rest[torch.randperm(len(rest))[: len(mine)]]])
            order = torch.randperm(len(x))
            return x[order], (torch.arange(len(x)) < len(mine))[order]

        means = {
            one: sae.encode(some.h).to_dense().reshape(len(some), 2, F).mean(1) for one, some in given.train.items()
        }
        chosen = {}
        for one in given.train:
            x, y = sides(means, one)
            effect = (x[y].mean(0) - x[~y].mean(0)).clamp(min=0) * (given.probes[one].weight[0].detach() @ sae.W_dec)
            chosen[one] = [f for f in effect.argsort(descending=True)[:n].tolist() if effect[f] != 0]
        for one in given.train:
            without = {}
            for which, some in given.test.items():
                acts = dense[which].clone()
                error = some.h - (acts @ sae.W_dec.T + sae.b_dec)
                acts[:, chosen[one]] = 0
                without[which] = (acts @ sae.W_dec.T + sae.b_dec + error).reshape(len(some), 2, D).mean(1)
            fall = {}
            for which in given.test:
                x, y = sides(without, which)
                right = ((given.probes[which](x).squeeze(-1) > 0) == y).float().mean()
                fall[which] = given.clean[which, which] - float(right)
            scores.append(fall.pop(one) - np.mean(list(fall.values())))
    assert found == pytest.approx(np.mean(scores), abs=0.02)
    assert name in chosen


def test_perturbing_the_truth_hits_its_class_alone(classes: tuple[torch.Tensor, Probes]) -> None:
    directions, given = classes
    own = tpp(truth(directions), given, (1, 2))
    # A probe that lost its class' direction calls its texts another class: up to half of what it is asked.
    assert 0.3 < own["tpp 1"] <= 0.5
    assert abs(tpp(truth(random_directions(8)), given, (1,))["tpp 1"]) < 0.1
    assert min(given.clean.values()) > 0.95


def test_removing_a_planted_spurious_attribute_gives_the_wanted_one_back() -> None:
    """Either value of an attribute has a direction; those of the spurious one are stronger."""
    directions = orthonormal(6)
    sides = []
    for seed in (0, 1):
        quadrants, rows = {}, []
        for a in (1, 0):
            for b in (1, 0):
                n = 240 if a == b else 120
                quadrants[a, b] = range(len(rows), len(rows) + n)
                x = drawn_texts(n, directions[4:], seed * 10 + 2 * a + b)
                rows += list(x + directions[a] + 2 * directions[2 + b])
        chosen = spurious(quadrants)
        assert len(chosen[WANTED]) == len(chosen[OTHER[WANTED]]) == len(chosen[BOTH]) == 240
        sides.append({name: bags(torch.stack([rows[i] for i in some]), 1, seed) for name, some in chosen.items()})
    given = train_probes(*sides, OTHER)
    # A probe of one attribute knows nothing of the other; the biased one knows half of both.
    assert given.clean[WANTED, SPURIOUS] == pytest.approx(0.5, abs=0.05)
    assert given.clean[BOTH, SPURIOUS] > 0.6
    assert scr(truth(directions), given, (2,))["scr 2"] > 0.3
    assert abs(scr(truth(random_directions(6)), given, (2,))["scr 2"]) < 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_contrast_is_ce_benchs_formula(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sae = random_sae()
    pairs = {
        name: tuple(Bags(torch.randn(9, D, generator=g) + i, torch.tensor(lengths)) for lengths in ([2, 7], [4, 5]))
        for i, name in enumerate("xy")
    }
    found = contrast(sae, pairs)  # type: ignore[arg-type]
    v1, v2, both = [], [], []
    for first, second in pairs.values():
        a, b = (one.h.split(one.lengths.tolist()) for one in (first, second))
        for left, right in zip(a, b, strict=True):
            v1.append(sae.encode(left).to_dense().mean(0).numpy())
            v2.append(sae.encode(right).to_dense().mean(0).numpy())
            both.append(sae.encode(torch.cat([left, right])).to_dense().mean(0).numpy())
    apart, alone = np.abs(np.array(v1) - v2), np.abs(np.array(both) - np.mean(both, axis=0))
    for name, distance in (("contrastive", apart), ("independence", alone), ("interpretability", apart + alone)):
        z = (distance - distance.mean(1, keepdims=True)) / distance.std(1, ddof=1, keepdims=True)
        assert found[name] == pytest.approx(z.max(1).mean(), rel=1e-4)


def test_absorption_of_one_word() -> None:
    """Feature 0 is the letter's own; feature 1 lies along the probe, feature 2 does not."""
    cosines = torch.tensor([0.9, 0.8, 0.05])

    def word(*acts: float) -> tuple[float, bool]:
        a = torch.tensor(acts)
        return absorbed(a, (a * cosines).sum(), cosines, [0])

    assert word(2.0, 0.0, 5.0) == (0.0, False)  # the letter's own feature has it
    assert word(0.0, 2.0, 0.0) == (1.0, True)  # another has it all
    share, full = word(1.0, 1.0, 0.0)
    assert (share, full) == (pytest.approx(0.8 / 1.7), False)
    assert word(0.0, 0.1, 8.0)[0] == 0.0  # what is along the probe carries less than 40% of the projection
    assert absorbed(torch.tensor([0.0, 2.0, 0.0]), torch.tensor(-1.0), cosines, [0])[1] is False


def test_absorption_finds_what_was_planted() -> None:
    """Letters are directions. One SAE has them; in the other a feature for some words of a letter takes it over."""
    rng = np.random.default_rng(0)
    d, letters, kinds, per, each = 96, 6, 8, 75, 3
    directions = orthonormal(letters * (1 + kinds), d)
    own, special = directions[:letters], directions[letters:].reshape(letters, kinds, d)
    y = np.repeat(np.arange(letters), per)
    # Three words of each kind, and the rest of none: no kind is worth a main feature of its own.
    which = np.tile(np.repeat(np.arange(-1, kinds), [per - each * kinds] + [each] * kinds), letters)
    order = rng.permutation(len(y))
    y, which = y[order], which[order]
    extra = torch.from_numpy(which >= 0)[:, None] * special[y, np.maximum(which, 0)]
    x = own[y] + extra + torch.from_numpy(rng.normal(size=(len(y), d)).astype(np.float32)) / 40
    words = tuple(LETTERS[i] * 2 for i in y)
    given = with_probes(words, x, torch.from_numpy(y), int(len(y) * 0.8))
    flat = special.reshape(-1, d)
    bias = torch.full((len(directions),), -0.3)
    clean = TopK(directions, directions.T.contiguous(), bias, torch.zeros(d), k=4)
    # A letter's feature is silent where one of a kind fires, which then stands for both.
    enc = torch.cat([own - 2 * special.sum(1), flat])
    dec = torch.cat([own, nn.functional.normalize(own.repeat_interleave(kinds, 0) + flat, dim=-1)])
    taken = TopK(enc, dec.T.contiguous(), bias, torch.zeros(d), k=4)
    good, bad = absorption(clean, given), absorption(taken, given)
    assert good["full absorption"] < 0.05
    assert good["absorbed share"] < 0.1
    assert bad["full absorption"] > good["full absorption"] + 0.15
    assert bad["absorbed share"] > good["absorbed share"] + 0.1
    with pytest.raises(InputError, match="no letter is known well enough"):
        absorption(clean, with_probes(words, torch.randn(len(y), d) / 100, torch.from_numpy(y), 200))


@pytest.fixture(scope="module")
def reading() -> Reading:
    from qwen_scope.score.steered import read_rows

    loaded = load_model(str(tiny.folder() / "model"), device="cpu")
    rows = torch.randint(5, 300, (40, 12), generator=torch.Generator().manual_seed(0))
    return read_rows(loaded, HookPoint(1), [rows], Counted())


def test_the_loss_of_steering_is_that_of_a_plain_hook(reading: Reading) -> None:
    sae = tiny.random_sae(2)
    found = steering_loss(sae, reading, features=2)
    model, ids = reading.loaded.model, reading.ids
    h = capture(model, ids, [HookPoint(1)])[HookPoint(1)]
    kept = torch.ones(ids.shape, dtype=torch.bool)
    kept[:, 0] = False
    norm = h[kept].norm(dim=-1).median()
    dense = sae.encode(h).to_dense() * kept[..., None]
    strongest = dense.amax(1)
    fires = (strongest > 0).sum(0)
    fitting = torch.where((fires >= 8) & (len(ids) - fires >= 8))[0].numpy()
    rng = np.random.default_rng(0)
    costs, effects = [], []
    for f in rng.permutation(fitting)[:2].tolist():
        own = strongest[:, f].argsort(descending=True)[:8]
        silent = torch.from_numpy(rng.permutation(np.flatnonzero(strongest[:, f].numpy() == 0))[:8])
        added = sae.W_dec[:, f] / sae.W_dec[:, f].norm() * 0.5 * norm

        def logp(some: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            hook = model.model.layers[1].register_forward_hook(lambda _, __, out: out + extra)
            logits = model(input_ids=ids[some]).logits.log_softmax(-1)
            hook.remove()
            return logits[:, :-1].gather(-1, ids[some][:, 1:, None]).mean((1, 2)).detach()

        change = [logp(some, added) - logp(some, torch.zeros(1)) for some in (own, silent)]
        costs.append(-float(change[1].mean()))
        effects.append(float(change[0].mean() - change[1].mean()))
    assert found["steering loss"] == pytest.approx(np.mean(costs), abs=1e-4)
    assert found["steering effect"] == pytest.approx(np.mean(effects), abs=1e-4)


def test_too_little_to_steer_on_is_one_sentence(reading: Reading) -> None:
    from qwen_scope.score.steered import read_rows

    with pytest.raises(InputError, match="5 rows of 12 tokens are too few to steer on; raise tokens"):
        read_rows(reading.loaded, HookPoint(1), [reading.ids[:5]], Counted())
    dead = TopK(
        *(getattr(tiny.random_sae(2), n) for n in ("W_enc", "W_dec")), torch.full((96,), -1e6), torch.zeros(32), 4
    )
    with pytest.raises(InputError, match="0 features fire in some of 40 rows"):
        steering_loss(dead, reading)


def test_bags_leave_out_what_does_not_count() -> None:
    loaded = load_model(str(tiny.folder() / "model"), device="cpu")
    texts = ["hello there, my friend", "hi", "The weather is fine today. Where is the station?"]
    found = read_bags(loaded, HookPoint(1), texts, Counted(), tokens=5, batch=2)
    at = 0
    for text, length in zip(texts, found.lengths.tolist(), strict=True):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:5]])
        alone = capture(loaded.model, ids, [HookPoint(1)])[HookPoint(1)][0]
        wanted = alone[1:] if len(alone) > 1 else alone
        torch.testing.assert_close(found.h[at : at + length], wanted, atol=1e-4, rtol=1e-4)
        at += length
    assert at == len(found.h)
    with pytest.raises(InputError, match="no text"):
        read_bags(loaded, HookPoint(1), [], Counted(), tokens=5)


def test_columns_are_labels() -> None:
    rows = [Document(f"{a}{b}{i}", {"a": a, "b": b}) for i in range(3) for a in "xyz" for b in ("p", "q")]
    data = ColumnData([*rows, Document("none", {})], ["a", "b"])
    assert data.names == ["a=x", "a=y", "a=z", "b=p", "b=q"]
    assert data.sets == ["a"]
    assert data.pairs == ["a=x|y x b=p|q"]
    one = data.read("a=y")
    assert len(one.texts) == 18
    assert [text for text, y in zip(one.texts, one.y, strict=True) if y] == [d.text for d in rows if d.meta["a"] == "y"]
    assert data.classes("a")["z"] == tuple(d.text for d in rows if d.meta["a"] == "z")
    assert data.crossed(data.pairs[0])[1, 0] == ("xq0", "xq1", "xq2")
    assert data.crossed(data.pairs[0])[0, 1] == ("yp0", "yp1", "yp2")
    with pytest.raises(NotFoundError, match=r"has no dataset 'a=w'; did you mean"):
        data.read("a=w")
    with pytest.raises(NotFoundError, match="no document that was read has a column 'c'"):
        ColumnData(rows, ["c"])
