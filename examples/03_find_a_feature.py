"""Which feature tells German from French? Found on half of the documents, measured on the other half."""

from __future__ import annotations

from qwen_scope import load_scope
from qwen_scope.features import feature_page, find, pool_texts
from qwen_scope.lab import documents

scope = load_scope("lab")
german, french = (
    pool_texts(scope, [d.text for d in documents(n=24, seed=1, kinds=["talk"], languages=[language])], layers=[4, 5])
    for language in ("de", "fr")
)
found = find(german, french, n=3)
print(f"{found.significant} of {found.tests:,} tests pass a false discovery rate of {found.level:g}")
for one in found.found:
    rule = f"{one.reduction} above {one.threshold:.2f}"
    print(f"layer {one.layer}, feature {one.feature}, {rule}: F1 {one.f1}, q {one.q:.1e}")

page = feature_page(found.found[0].layer, found.found[0].feature, scope=scope, n=5)
print("promotes", [effect.text for effect in page.promoted])
