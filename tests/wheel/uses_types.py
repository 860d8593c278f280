"""What a project that depends on qwen-scope sees; `tests/wheel/run.sh` checks this file with pyright, strictly."""

from typing import assert_type

from qwen_scope import (
    FeatureActs,
    FeatureStore,
    HookPoint,
    Intervention,
    Scope,
    __version__,
    catalog,
    load_sae,
    load_scope,
    save_sae,
)
from qwen_scope.sae import SAE, Group
from qwen_scope.scope import TokenFeatures

assert_type(__version__, str)

scope = load_scope("lab")
assert_type(scope, Scope)
seen = scope.features(["Where is the station?"], layers=[4])
assert_type(seen, TokenFeatures)
assert_type(seen.acts[4], FeatureActs)
assert_type(scope.saes[4], SAE)

sae = load_sae("lab", layer=4)
assert_type(sae, SAE)
assert_type(sae.d_sae, int)
assert_type(sae.k, int | None)
save_sae(sae, "out")

assert_type(HookPoint.parse("layers.4.resid_post"), HookPoint)
assert_type(Intervention.add(layer=4, feature=17, amount=0.5, unit="resid_norm"), Intervention)
assert_type(FeatureStore("out/store"), FeatureStore)
assert_type(catalog.groups(), tuple[Group, ...])
