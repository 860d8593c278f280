"""delphi's own reader on a latents folder of ours: run in an environment of its own, with the folder's parent.

    python check_delphi.py WORK

WORK holds `latents/` (written by `qwen-scope export --to delphi`) and `expected.npz`: per feature its activations, in
the order of rows and positions, and the tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset

work = Path(sys.argv[1])
expected = np.load(work / "expected.npz")
module = "layers.0"
latents = torch.from_numpy(expected["features"])
dataset = LatentDataset(
    work / "latents",
    SamplerConfig(),
    ConstructorConfig(),
    tokenizer=object(),
    modules=[module],
    latents={module: latents},
)
assert dataset.tokens is None or np.array_equal(np.asarray(dataset.tokens), expected["tokens"]), "the tokens differ"
seen = {}
for buffer in dataset.buffers:
    assert np.array_equal(buffer.tokens.numpy(), expected["tokens"]), "the tokens of a split differ"
    for data in buffer:
        seen[data.latent.latent_index] = data.activation_data
for feature in latents.tolist():
    rows, values = expected[f"locations_{feature}"], expected[f"activations_{feature}"]
    found = seen.get(feature)
    if not len(values):
        assert found is None, f"feature {feature} fires nowhere and delphi sees it"
        continue
    order = np.lexsort((found.locations[:, 1].numpy(), found.locations[:, 0].numpy()))
    assert np.array_equal(found.locations[:, :2].numpy()[order], rows), f"feature {feature} fires elsewhere"
    assert np.array_equal(found.activations.numpy()[order], values), f"feature {feature} fires otherwise"
print(f"ok: delphi reads {len(latents)} features of {module} as they are in the store")
