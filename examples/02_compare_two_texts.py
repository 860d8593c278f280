"""Which features tell an English sentence from its German translation, layer by layer. Runs on the bundled lab."""

from qwen_scope import load_scope

ENGLISH = "Where is the station? I am going to the market."
GERMAN = "Wo ist der Bahnhof? Ich gehe zum Markt."


def main() -> None:
    scope = load_scope("lab")
    for layer, found in scope.compare(ENGLISH, GERMAN, n=3, drop_common=True).items():
        for c in found:
            print(f"layer {layer}  feature {c.feature:5d}  {c.rate_a:4.0%} English  {c.rate_b:4.0%} German")


if __name__ == "__main__":
    main()
