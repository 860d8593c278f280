# ---
# jupyter:
#   jupytext: {formats: "py:percent,ipynb", notebook_metadata_filter: "-all"}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Audit a dataset
#
# A frame of questions and answers becomes a store of features: columns join to the text that the model reads.

# %%
import tempfile
from pathlib import Path

import pandas as pd

from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, redundancy_of
from qwen_scope.text import CorpusOptions

foods = ("bread", "rice", "fish", "cheese", "honey", "cake", "butter", "salad")
table = pd.DataFrame(
    {
        "question": [*(f"Do you want some {food}?" for food in foods), "Wo ist der Bahnhof?", "12 + 30 = "],
        "answer": [*["Yes, please."] * len(foods), "Da.", "42"],
    }
)
scope = load_scope("lab")
folder = Path(tempfile.mkdtemp())
store = scope.extract(table, folder / "store", layers=4, reading=CorpusOptions(template="{question}\n{answer}"))
store

# %% [markdown]
# Which items could be left out, because the others hold every feature of theirs, and which are twins?

# %%
result = redundancy_of([Dataset.from_store(store, 4, "max", name="questions")], near=0.7)
result

# %%
items = result.items.to_pandas()
items

# %% [markdown]
# The rows of the table with what was found beside them.

# %%
table.join(items[["redundant", "twin", "similarity"]])
