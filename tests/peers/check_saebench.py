"""SAEBench's and sae-probes' own functions beside ours, on the lab: run by run.sh in their environment.

check_saebench.py WHEEL_OR_FOLDER_OF_SAE_PROBES
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

warnings.simplefilter("ignore")
import sae_bench.evals.core.main as core  # noqa: E402
import sae_bench.evals.scr_and_tpp.main as theirs_scr  # noqa: E402
from datasets import Dataset  # noqa: E402
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator  # noqa: E402
from sae_bench.evals.absorption.k_sparse_probing import train_k_sparse_probes  # noqa: E402
from sae_bench.evals.absorption.probing import train_multi_probe  # noqa: E402
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations  # noqa: E402
from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations  # noqa: E402
from sae_lens import ActivationsStore  # noqa: E402
from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization  # noqa: E402
from sae_probes.utils_training import find_best_reg  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_qwen3_weights  # noqa: E402

from qwen_scope import load_sae  # noqa: E402
from qwen_scope.model import HookPoint, capture, load_model  # noqa: E402
from qwen_scope.sae import SAE, Identity, JumpReLU, TopK, fingerprint  # noqa: E402
from qwen_scope.scope import model_source  # noqa: E402
from qwen_scope.score import ProbeData, probe, read_split, scope_sae  # noqa: E402
from qwen_scope.score.absorb import absorption, with_probes  # noqa: E402
from qwen_scope.score.bags import Bags  # noqa: E402
from qwen_scope.score.labelled import ColumnData  # noqa: E402
from qwen_scope.score.perturb import BOTH, OTHER, SPURIOUS, WANTED, scr, spurious, tpp, train_probes  # noqa: E402
from qwen_scope.text import Corpus, Counted, TokenRows  # noqa: E402
from qwen_scope.train import evaluate_saes  # noqa: E402

LAYER, CONTEXT, BATCH = 4, 64, 32
POINT = HookPoint(LAYER)
HOOK = f"blocks.{LAYER}.hook_resid_post"
DATASETS = ("87_glue_cola", "113_movie_sent", "5_hist_fig_ismale", "105_click_bait", "106_hate_hate")
FAILED: list[str] = []


def check(name: str, ours: Any, theirs: Any, within: float) -> None:
    """One line, and whether the two differ by at most a share of theirs."""
    ours, theirs = (torch.as_tensor(one, dtype=torch.float64) for one in (ours, theirs))
    apart = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("nan")
    fine = apart <= within * max(float(theirs.abs().max()), 1e-12)
    shown = f"{float(ours):.6f} {float(theirs):.6f}" if ours.ndim == 0 else f"of {tuple(ours.shape)}"
    print(f"{'ok' if fine else 'WRONG':6s}{name}: {shown}, apart by {apart:.2g}", flush=True)
    if not fine:
        FAILED.append(name)


def lens(loaded: Any) -> HookedTransformer:
    """The lab in TransformerLens, by its own conversion of Qwen3's weights."""
    c = loaded.model.config
    made = HookedTransformerConfig(
        d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads, n_layers=c.num_hidden_layers,
        d_mlp=c.intermediate_size, n_ctx=c.max_position_embeddings, d_vocab=c.vocab_size, act_fn="silu",
        n_key_value_heads=c.num_key_value_heads, eps=c.rms_norm_eps, normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_dim=c.head_dim, rotary_adjacent_pairs=False, gated_mlp=True,
        rotary_base=int(c.rope_parameters["rope_theta"]), use_qk_norm=True, original_architecture="Qwen3ForCausalLM",
        dtype=torch.float32, device="cpu", model_name="lab", default_prepend_bos=False,
    )  # fmt: skip
    model = HookedTransformer(made)
    model.load_state_dict(convert_qwen3_weights(loaded.model, made), strict=False)
    return model.eval()


def store(model: HookedTransformer, rows: torch.Tensor) -> ActivationsStore:
    """SAEBench's own reader of tokens, on rows of ours."""
    return ActivationsStore(
        model=model, dataset=Dataset.from_dict({"tokens": rows.tolist()}), streaming=False, hook_name=HOOK,
        hook_head_index=None, context_size=CONTEXT, d_in=model.cfg.d_model, n_batches_in_buffer=2,
        total_training_tokens=rows.numel(), store_batch_size_prompts=BATCH, train_batch_size_tokens=CONTEXT,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip


def check_object(sae: SAE, x: torch.Tensor, kind: str) -> None:
    """It encodes and reconstructs as ours does, with directions of length 1."""
    made = scope_sae(sae, "lab")
    check(f"{kind}: reconstruction", sae.decode(sae.encode(x)), made(x), 1e-4)
    check(f"{kind}: decoder of length 1", 1.0, float(made.check_decoder_norms()), 0)
    check(f"{kind}: L0", sae.encode(x).active().double().mean(), (made.encode(x) > 0).sum(-1).double().mean(), 1e-6)
    check(f"{kind}: encoder", made.encode(x).max(), (x @ made.W_enc + made.b_enc).max(), 1e-4)


def check_core(sae: SAE, model: HookedTransformer, loaded: Any, rows: torch.Tensor) -> None:
    """SAEBench's core on its own object in TransformerLens, and `evaluate_saes` on ours in transformers."""
    with contextlib.redirect_stdout(io.StringIO()):
        said, _ = core.run_evals(
            scope_sae(sae, "lab"), store(model, rows), model,
            core.CoreEvalConfig(
                batch_size_prompts=BATCH, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1,
                compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            ),
        )  # fmt: skip
    theirs = {name: value for group in said.values() for name, value in group.items()}
    found = evaluate_saes(loaded.model, {POINT: sae}, [rows], counted=Counted.everything())[POINT]
    loss = found.loss
    assert loss is not None
    pairs = {
        "ce_loss_score": loss.ce_recovered, "ce_loss_with_sae": loss.ce_spliced, "ce_loss_without_sae": loss.ce_clean,
        "ce_loss_with_ablation": loss.ce_zero, "kl_div_with_sae": loss.kl, "kl_div_score": loss.kl_recovered,
        "l0": found.reconstruction.l0, "cossim": found.reconstruction.cosine,
        "explained_variance_legacy": found.reconstruction.explained_variance_per_token,
    }  # fmt: skip
    for name, value in pairs.items():
        check(f"core: {name}", value, theirs[name], 0.001)


def check_probes(sae: SAE, loaded: Any, place: Path) -> None:
    """Sparse probing on five datasets: sae-probes' own ranking and regression on the same residuals."""
    data = ProbeData(place)
    for name in DATASETS:
        split = read_split(loaded, POINT, data.read(name), rows=280, tokens=128)
        mine = probe(sae, split, name, ks=(1, 5))
        acts, y = sae.encode(split.x).to_dense(), split.y
        train, test = acts[split.train], acts[split.test]
        order = get_sorted_indices(train, torch.from_numpy(y[split.train]), mean_act_normalization)
        pairs = {k: (train[:, order[:k]], test[:, order[:k]], "l1", mine.features[k]) for k in (1, 5)}
        pairs["residual"] = (split.x[split.train], split.x[split.test], "l2", mine.residual)
        for k, (a, b, penalty, value) in pairs.items():
            theirs = find_best_reg(a.numpy(), y[split.train], b.numpy(), y[split.test], penalty=penalty)
            check(f"sae-probes: {name}, {k}", value, theirs.metrics.test_auc, 0.005)


NS = (5, 20, 50, 200, 500)
THEIR_NAMES = {
    SPURIOUS: "male / female", OTHER[SPURIOUS]: "female_data_only",
    WANTED: "professor / nurse", OTHER[WANTED]: "nurse_data_only",
    BOTH: "male_professor / female_nurse", OTHER[BOTH]: "female_nurse_data_only",
}  # fmt: skip


def bags(loaded: Any, texts: dict[str, list[str]], length: int = 16) -> dict[str, torch.Tensor]:
    """Residuals of the first tokens of texts that are long enough, `(texts, length, d_model)`."""
    out = {}
    for name, some in texts.items():
        ids = [loaded.tokenizer(text)["input_ids"][:length] for text in some]
        rows = torch.tensor([one for one in ids if len(one) == length])
        out[name] = capture(loaded.model, rows, [POINT])[POINT]
    return out


def of(h: torch.Tensor) -> Bags:
    return Bags(h.flatten(0, 1), torch.full((len(h),), h.shape[1]))


def their_accuracies(sae: SAE, train: dict, test: dict, chosen: list[str], perform_scr: bool) -> tuple[Any, Any]:
    """What SAEBench does for one dataset once it has read the texts, by its own functions."""
    made = scope_sae(sae, "lab")
    torch.manual_seed(42)
    means = [create_meaned_model_activations(side) for side in (train, test)]
    with contextlib.redirect_stdout(io.StringIO()):
        probes, _ = train_probe_on_activations(
            *means, use_sklearn=False, batch_size=16, epochs=20, lr=1e-3, perform_scr=perform_scr,
            early_stopping_patience=20, l1_penalty=1e-3,
        )  # fmt: skip
        torch.set_grad_enabled(False)
        clean = theirs_scr.get_probe_test_accuracy(probes, chosen, means[1], 500, perform_scr)
        effects = theirs_scr.get_all_node_effects_for_one_sae(made, probes, chosen, perform_scr, train, 125)
        found = theirs_scr.perform_feature_ablations(
            probes, made, 125, test, effects, list(NS), chosen, 500, perform_scr
        )
        torch.set_grad_enabled(True)
        if perform_scr:
            return theirs_scr.get_scr_plotting_dict(found, clean), clean
        return theirs_scr.create_tpp_plotting_dict(found, clean)[0], clean


def check_perturbed(sae: SAE, loaded: Any) -> None:
    """TPP on three languages and SCR of language against register, by SAEBench's functions on the same residuals."""
    data = ColumnData(islice(Corpus("lab:kind=talk"), 2500), ["language", "register"])
    texts = {name: list(some) for name, some in list(data.classes("language").items())[:3]}
    h = {name: one[:150] for name, one in bags(loaded, texts).items()}
    train, test = ({name: one[part] for name, one in h.items()} for part in (slice(0, 100), slice(100, 150)))
    found, clean = their_accuracies(sae, train, test, list(train), perform_scr=False)
    given = train_probes(*({name: of(one) for name, one in side.items()} for side in (train, test)), None)
    mine = tpp(sae, given, NS)
    for name in train:
        check(f"tpp: probe of {name}", given.clean[name, name], clean[name], 0.01)
    for n in NS:
        check(f"tpp {n}", mine[f"tpp {n}"], found[f"tpp_threshold_{n}_total_metric"], 0.01)
    quadrants = {which: list(some) for which, some in data.crossed("language=en|de x register=polite|rude").items()}
    h = {str(which): one for which, one in bags(loaded, quadrants).items()}
    sides = []
    for part in (slice(0, 60), slice(60, 100)):
        cut = {which: range(*part.indices(len(h[str(which)]))) for which in quadrants}
        chosen = spurious({which: [(str(which), i) for i in some] for which, some in cut.items()})
        sides.append({name: torch.stack([h[which][i] for which, i in some]) for name, some in chosen.items()})
    named = [{THEIR_NAMES[name]: one for name, one in side.items()} for side in sides]
    found, clean = their_accuracies(sae, *named, [THEIR_NAMES[name] for name in OTHER], perform_scr=True)
    given = train_probes(*({name: of(one) for name, one in side.items()} for side in sides), OTHER)
    mine = scr(sae, given, NS)
    for n in NS:
        check(f"scr {n}", mine[f"scr {n}"], found[f"scr_metric_threshold_{n}"], 0.01)


def planted_letters() -> tuple[SAE, torch.Tensor, torch.Tensor]:
    """26 letters as directions, a feature for each and another that takes over on some words; residuals and letters."""
    g = torch.Generator().manual_seed(0)
    d_model, d_sae, n = 64, 96, 1300
    y = torch.randint(0, 26, (n,), generator=g)
    own = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=g), dim=1)
    decoder = own.clone()
    decoder[26:52] = torch.nn.functional.normalize(0.9 * own[:26] + 0.5 * own[26:52], dim=1)
    x = own[y] * (1 + 2 * torch.rand(n, 1, generator=g)) + 0.1 * torch.randn(n, d_model, generator=g)
    taken = torch.rand(n, generator=g) < 0.3
    x[taken] += 2.5 * decoder[26 + y[taken]] - own[y[taken]]
    weights = {"W_enc": decoder.clone(), "W_dec": decoder.T.contiguous(), "b_enc": torch.full((d_sae,), -0.2)}
    weights["b_dec"] = torch.zeros(d_model)
    identity = Identity("planted", 0, fingerprint(**weights))
    return TopK(**weights, k=4, hook_point="layers.0.resid_post", identity=identity), x, y


class Words:
    """What SAEBench's calculator asks of a model: the residuals of the words that it names, in their order."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.at = x, 0

    def to_tokens(self, _: str) -> torch.Tensor:
        return torch.zeros(1, 1)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        some = self.x[self.at : self.at + len(prompts)]
        self.at += len(prompts)
        return None, {names_filter[0]: some[:, None]}


def check_absorption(train: int = 1000) -> None:
    """Its probes, its choice of main features by k-sparse probes, and its calculator, on the same residuals."""
    sae, x, y = planted_letters()
    given = with_probes(tuple(map(str, range(len(y)))), x, y, train)
    mine, made, batch = absorption(sae, given), scope_sae(sae, "lab"), -(-train // 8)
    with contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(42)
        probe = train_multi_probe(
            x[:train].clone(), torch.nn.functional.one_hot(y[:train], 26).float(), num_probes=26, batch_size=batch,
            num_epochs=50, weight_decay=1e-4, device=torch.device("cpu"), show_progress=False,
        )  # fmt: skip
        torch.manual_seed(42)
        labels, ks = [("", letter) for letter in y[:train].tolist()], range(1, 11)
        sparse = train_k_sparse_probes(made, labels, x[:train], ks, batch_size=batch, precalc_sae_acts=True)
    acts, said, found = made.encode(x[train:]).float(), probe(x[train:]).detach(), []
    for letter in range(26):
        is_it, knows = (y[train:] == letter).numpy(), (said[:, letter] > 0).numpy()
        if f1_score(is_it, knows) <= 0.6:
            continue
        best, main = -100.0, []
        for k in ks:
            f1 = f1_score(is_it, (sparse[k][letter](acts) > 0).numpy())
            if f1 <= best + 0.03:
                break
            best, main = f1, sparse[k][letter].feature_ids.tolist()
        asked = np.flatnonzero(is_it & knows)
        calculator = FeatureAbsorptionCalculator(Words(x[train:][asked]), ["apple", "bear"], 1, word_token_pos=-1)
        direction = probe.weights[letter].detach()
        words = calculator.calculate_absorption(made, [f"w{i}" for i in asked], direction, main, 0, False).word_results
        found.append([np.mean([w.absorption_fraction for w in words]), np.mean([w.is_full_absorption for w in words])])
        found[-1].append(len(main))
    check("absorption: letters with a probe", 23, len(found), 0)
    for name, theirs in zip(("absorbed share", "full absorption", "main features"), np.mean(found, 0), strict=True):
        check(f"absorption: {name}", mine[name], theirs, 0.001)


def main(place: Path) -> None:
    """Every check; exit code 1 if one fails."""
    check_absorption()
    torch.manual_seed(0)
    loaded = load_model(model_source("lab"), device="cpu")
    sae = load_sae("lab", LAYER)
    corpus = Corpus("lab", hold_out=10, held_out=True)
    rows = torch.cat(
        TokenRows(corpus, loaded.tokenizer, context_length=CONTEXT, batch_size=BATCH).take(CONTEXT * BATCH)
    )
    x = capture(loaded.model, rows, [POINT])[POINT]
    model = lens(loaded)
    with torch.no_grad():
        check("residuals of TransformerLens", x, model.run_with_cache(rows, names_filter=[HOOK])[1][HOOK], 1e-4)
    check_object(sae, x.flatten(0, 1), "topk")
    threshold = torch.full((sae.d_sae,), float(np.quantile(sae.encode(x).values.numpy(), 0.2)))
    jump = JumpReLU(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, threshold, hook_point=sae.hook_point)
    check_object(jump, x.flatten(0, 1), "jumprelu")
    check_core(sae, model, loaded, rows)
    check_perturbed(sae, loaded)
    check_probes(sae, loaded, place)
    print(f"{len(FAILED)} failed")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
