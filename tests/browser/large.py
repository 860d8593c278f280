"""The page on a model as large as Qwen3-1.7B, with random weights, on a CPU: what a visitor waits for, and is told.

    PYTHONPATH=tests .venv/bin/python tests/browser/large.py [--layers 0 13 27] [--folder out/large]

On a busy machine the seconds of processors say more. It writes the model (3.4 GB in bfloat16) and an SAE of 32,768
features for each layer once, serves the page, and does in a browser what a visitor does first. Every wait of more
than a second has to show a spinner with a stage.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from explored import served
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qwen_scope import load_scope
from qwen_scope.explorer import AppState
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.scope import model_source

D_MODEL, D_SAE, N_LAYERS, K = 2048, 32_768, 28, 50
PATIENCE = 300_000  # milliseconds


def make(folder: Path, layers: list[int]) -> None:
    """The model with the lab's tokenizer, and the SAEs, unless they are there."""
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151_936, hidden_size=D_MODEL, intermediate_size=6144, num_hidden_layers=N_LAYERS,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
            tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_source("lab"))
        with torch.no_grad():  # no token that the tokenizer does not have is ever likely
            model.get_input_embeddings().weight[len(tokenizer) :] = 0
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    for layer in layers:
        if (folder / "sae" / f"layer{layer}.sae.pt").exists():
            continue
        made = torch.Generator().manual_seed(layer)
        W_dec = torch.nn.functional.normalize(torch.randn(D_MODEL, D_SAE, generator=made), dim=0)
        sae = TopK(
            W_enc=W_dec.T.contiguous(), W_dec=W_dec, b_enc=torch.zeros(D_SAE), b_dec=torch.zeros(D_MODEL), k=K,
            hook_point=f"layers.{layer}.resid_post",
            identity=Identity("SAE-Res-Large-W32K-L0_50", layer, f"{layer:064x}"),
        )  # fmt: skip
        save_sae(sae, folder / "sae", dtype=torch.bfloat16)


def waited(page: Page, tab: str, what: str, start: Callable[[], None], ready: Callable[[], bool]) -> bool:
    """Do something and look ten times a second until it is there; print how long that took and what was told."""
    started, used, told, silent = time.monotonic(), time.process_time(), [], 0.0
    start()
    while not ready():
        words = page.locator(f"#{tab}-notice [role=status], #{tab}-graph [role=status], #{tab}-depth [role=status]")
        now = next(iter(words.all_text_contents()), "")  # at once: one that vanishes meanwhile is not waited for
        silent = 0.0 if now else silent + 0.1
        stage = now.split(" …")[0]
        if stage and stage not in told:
            told.append(stage)
        if time.monotonic() - started > PATIENCE / 1000:
            sys.stdout.write(f"{what}: not there after {PATIENCE / 1000:.0f} s\n")
            return False
        page.wait_for_timeout(100)
    took, used = time.monotonic() - started, time.process_time() - used
    well = took < 1.5 or bool(told)
    stages = f"told: {', then '.join(told) or 'nothing'}{'' if well else '  <- SILENT'}"
    sys.stdout.write(f"{what}: {took:.1f} s, {used:.1f} s of processors; {stages}\n")
    sys.stdout.flush()
    return well


def visit(page: Page, layers: list[int]) -> bool:
    """What a visitor does first."""

    def there(selector: str) -> Callable[[], bool]:
        return lambda: page.locator(selector).count() > 0 and page.locator(selector).first.is_visible()

    def click(selector: str) -> Callable[[], None]:
        return lambda: page.locator(selector).first.click()

    page.locator("#explore-text textarea").fill("Guten Morgen, wo ist der Bahnhof?")
    well = [waited(page, "explore", "read a text", click("#explore-read"), there("#explore-heat table"))]
    page.locator("#explore-layer input").click()
    before = page.locator("#explore-heat table").text_content()
    last = page.get_by_role("option", name=str(layers[-1]), exact=True)
    other = lambda: page.locator("#explore-heat table").text_content() != before  # noqa: E731
    well.append(waited(page, "explore", "another layer", last.click, other))
    link = "#explore-text-features a.qs-open"
    well.append(waited(page, "feature", "a feature", click(link), there("#feature-title h2")))
    page.get_by_role("button", name="Steer with this").click()
    expect(page.locator("#steer-run")).to_be_visible()
    page.locator("#steer-prompt textarea").fill("Guten Morgen, wo ist")
    page.get_by_role("button", name="Sampling").click()
    page.locator("#steer-run").scroll_into_view_if_needed()
    prose = there("#steer-steered .qs-prose, #steer-steered button.qs-token")
    well.append(waited(page, "steer", "first steered token", click("#steer-run"), prose))
    page.locator("#steer-stop").click()
    page.get_by_role("tab", name="Chat").click()
    page.locator("#chat-message textarea").fill("Hello")
    well.append(waited(page, "chat", "first token of an answer", click("#chat-send"), there("#chat-talk .qs-badge")))
    page.locator("#chat-stop").click()
    return all(well)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 13, 27])
    parser.add_argument("--folder", type=Path, default=Path("out/large"))
    options = parser.parse_args()
    make(options.folder, options.layers)
    scope = load_scope(str(options.folder / "model"), str(options.folder / "sae"), device="cpu", dtype="bfloat16")
    state, started = AppState(scope), time.monotonic()
    state.warm()  # as the command does before it opens the page
    sys.stdout.write(f"before the page opens: {time.monotonic() - started:.1f} s\n")
    with sync_playwright() as tools, served(state) as url:
        browser = tools.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        well = visit(page, options.layers)
        browser.close()
    sys.exit(not well)


if __name__ == "__main__":
    main()
