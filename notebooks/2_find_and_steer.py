# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Find a feature, and steer with it
#
# Two sets of texts that differ in one thing. Half of them choose features, the other half measures them.

# %%
from qwen_scope import Intervention, load_scope
from qwen_scope.features import FindOptions, find
from qwen_scope.lab import documents

scope = load_scope("lab")
german, french = (
    [one.text for one in documents(n=24, seed=1, kinds=["talk"], languages=[language])] for language in ("de", "fr")
)
found = find(scope, german, french, layers=5, options=FindOptions(n=3))
found

# %% [markdown]
# The first of them, added to the residual stream while the model writes.

# %%
from qwen_scope.steer import Decoding

best = found.found[0]
more = Intervention.add(layer=best.layer, feature=best.feature, amount=0.5, unit="resid_norm")
some = Decoding(max_new_tokens=16, sample=True, seed=1)
scope.generate("[12:30] Anna: ", more, decoding=some, candidates=0)

# %%
scope.generate("[12:30] Anna: ", decoding=some, candidates=0)

# %% [markdown]
# One text proves nothing. A sweep measures dose and response, and `validate` compares with controls.

# %%
from qwen_scope.features import SweepOptions, TargetOptions, sweep, target_of

aim = target_of(scope, TargetOptions(regex=r"\b(der|die|das|ist|und|wo|ich)\b"))
doses = sweep(scope, ["[12:30] Anna: ", "[9:05] Tom: "], more, aim, SweepOptions((0.5, 1.0), refine=0))
[(dose.amount, dose.effect.estimate) for dose in doses.doses]
