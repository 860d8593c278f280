# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Coming from TransformerLens or nnsight
#
# `scope.hooks(model, ...)` reads features from a model object of another library while that library runs it, and
# changes its residual stream. Nothing is copied, and no hook remains afterwards. This notebook needs
# `pip install transformer-lens nnsight`.

# %%
import torch
from nnsight import LanguageModel
from transformer_lens.model_bridge import TransformerBridge

from qwen_scope import Intervention, load_scope

scope = load_scope("lab")
text = "[12:30] Anna: Guten Morgen, wo ist der"
more = Intervention.add(layer=4, feature=283, amount=0.3, unit="resid_norm")
scope

# %% [markdown]
# ## A bridge of TransformerLens
#
# The bridge runs the Hugging Face model as it is. Features are read beside whatever hooks of its own you add.

# %%
other = load_scope("lab")
bridge = TransformerBridge.boot_transformers(other.name, hf_model=other.model, tokenizer=other.tokenizer)
ids = scope.tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad(), scope.hooks(bridge, layers=4) as seen:
    logits, cache = bridge.run_with_cache(ids)
seen[4].indices[0, -1, :5]  # the strongest features of the last token

# %%
with torch.no_grad(), scope.hooks(bridge, more, layers=4):
    steered = bridge(ids)
scope.tokenizer.decode(logits[0, -1].argmax()), scope.tokenizer.decode(steered[0, -1].argmax())

# %% [markdown]
# ## A model of nnsight

# %%
model = LanguageModel(load_scope("lab").model, tokenizer=scope.tokenizer)
with torch.no_grad(), scope.hooks(model, more, layers=4) as seen, model.trace(text):
    out = model.lm_head.output.save()
torch.allclose(out, steered, atol=1e-3)

# %% [markdown]
# ## Either of them as a scope
#
# `load_scope` takes the object itself; everything else of this package then works on its model.

# %%
load_scope(model, "lab").features(text, layers=4)
