"""Which feature tells German from French? Found on half of the documents, measured on the other half."""

from __future__ import annotations

from qwen_scope import load_scope
from qwen_scope.features import FindOptions, feature_page, find
from qwen_scope.lab import documents

scope = load_scope("lab")
german, french = (
    [d.text for d in documents(n=24, seed=1, kinds=["talk"], languages=[language])] for language in ("de", "fr")
)
found = find(scope, german, french, [4, 5], FindOptions(n=3))
print(f"{found.significant} of {found.tests:,} tests pass a false discovery rate of {found.level:g}")
for one in found.found:
    rule = f"{one.reduction} above {one.threshold:.2f}"
    print(f"feature {one.layer}/{one.feature}, {rule}: F1 {one.f1}, q {one.q:.1e}")

page = feature_page(found.found[0].layer, found.found[0].feature, scope=scope, n=5)
print("promotes", [effect.text for effect in page.promoted])
