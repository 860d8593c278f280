# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Train an SAE
#
# A small one, on few tokens, so that it takes seconds. `qwen-scope plan MODEL --train` says what a real one takes.

# %%
import tempfile
from pathlib import Path

from qwen_scope import load_sae, load_scope
from qwen_scope.train import TrainConfig, TrainRun, run_train

run = TrainRun(
    data="lab",
    out=Path(tempfile.mkdtemp()) / "run",
    train=TrainConfig(d_sae=256, k=16, tokens=20_000, batch=512),
    layers=(4,),
    eval_tokens=2048,
)
result = run_train(run)
result

# %% [markdown]
# The folder is in the official layout: it opens like any other.

# %%
sae = load_sae(result.folder)
sae.d_sae, sae.k, sae.hook_point

# %%
scope = load_scope("lab", str(result.folder))
scope.features("Where is the station?", layers=4)
