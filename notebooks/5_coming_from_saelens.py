# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Coming from SAELens
#
# `docs/from-saelens.md` has the calls side by side. Two things differ: activations are the k active ones instead of a
# row of zeros, and `W_dec` has its features in columns.

# %%
import torch

from qwen_scope import FeatureActs, load_sae, save_sae

sae = load_sae("lab", layer=4)  # SAE.from_pretrained(release, sae_id)
x = sae.b_dec + torch.randn(3, sae.d_model)
acts = sae.encode(x)
acts.indices.shape, acts.to_dense().shape

# %%
torch.equal(sae.decode(acts), sae.decode(FeatureActs.from_dense(acts.to_dense())))

# %% [markdown]
# A folder that `SAE.load_from_disk` takes; with sae_lens installed, `sae.to_sae_lens()` gives the object at once.

# %%
import tempfile
from pathlib import Path

folder = save_sae(sae, Path(tempfile.mkdtemp()) / "sae", layout="sae_lens")
sorted(path.name for path in folder.iterdir())

# %%
load_sae(folder).identity == sae.identity
