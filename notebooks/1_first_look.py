# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A first look
#
# A model, its SAEs, and what is active in a text. Everything runs on the lab, a tiny model in the package; put another
# model and its SAEs in its place: `load_scope("Qwen/Qwen3-1.7B-Base", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")`.

# %%
from qwen_scope import load_scope

scope = load_scope("lab")
scope

# %% [markdown]
# The strongest features of layer 5, each on the tokens that it fires on. Tokens with a dashed frame do not count.

# %%
seen = scope.features(["Wo ist der Bahnhof?", "Where is the station?"], layers=5)
seen

# %% [markdown]
# The same as a frame, with a row for each feature of each token.

# %%
frame = seen.to_pandas()
frame.sort_values("activation", ascending=False).head()

# %% [markdown]
# What tells the two texts apart: the features whose share of active tokens differs most.

# %%
scope.compare("Wo ist der Bahnhof?", "Where is the station?", layers=5)
