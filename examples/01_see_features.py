"""The strongest features of a few sentences, and where they fire. Runs on the bundled lab."""

from qwen_scope import load_scope

TEXTS = ["Could you tell me where the station is, please?", "Shut up, you fool!", "车站在哪里？", "12 + 30 = 42"]


def main() -> None:
    scope = load_scope("lab")
    layer = scope.layers[-2]
    seen = scope.features(TEXTS, layers=[layer])
    for i, tokens in enumerate(seen.tokens):
        print(f"\n{TEXTS[i]}")
        for found in seen.strongest(i, layer, n=3):
            values = seen.of(i, layer).select([found.feature])[:, 0]
            where = " ".join(repr(tokens[t]) for t in values.nonzero().flatten().tolist())
            print(f"  feature {found.feature:5d}  max {found.maximum:6.2f}  on {found.rate:4.0%} of tokens: {where}")


if __name__ == "__main__":
    main()
