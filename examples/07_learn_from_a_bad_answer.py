"""One answer of each group is steered into Chinese; reinforcement learning sees a fault that the model rarely makes."""

import json
import tempfile
from pathlib import Path

from qwen_scope import load_scope
from qwen_scope.lab import documents
from qwen_scope.posttrain import RLRun, lab_rows, prepare, run_rl
from qwen_scope.steer import Intervention, Recipe


def main() -> None:
    scope = load_scope("lab")
    labelled = [(str(found.language), found.text) for found in documents(n=90, kinds=["talk"])]
    features = prepare(scope, labelled, target="zh", layers=[5]).layers[0].features
    added = [Intervention.add(layer=5, feature=f, amount=0.7, unit="resid_norm") for f in features]
    interventions = [one.resolve(scope.stats[5], scope.saes[5]) for one in added]
    recipe = Recipe.of("Chinese", scope.model, interventions, scope.saes)
    print(
        "steered with",
        ", ".join(f"layer {one.layer} feature {one.feature} by {one.amount:.1f}" for one in interventions),
    )

    questions = [row for row in lab_rows(60, sums=0.0) if row["language"] not in {"zh", "ja"}]
    with tempfile.TemporaryDirectory() as folder:
        run = RLRun(
            "lab",
            Path(folder),
            method="steered",
            reward="language",  # the share of an answer's letters in the script of its question
            sae="lab",
            unchecked=True,  # nobody has checked on this model that the features cause what they stand for
            group=4,
            prompts=4,
            micro=16,
            steps=4,
            lr=2e-5,
            max_new_tokens=24,
            device="cpu",
        )
        run_rl(run, questions, recipe=recipe)
        for line in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()):
            if "steered/reward" in line:
                rewards = f"ordinary {line['ordinary/reward']:.2f}, steered {line['steered/reward']:.2f}"
                print(f"step {line['step']}  rewards: {rewards}  loss {line['loss']:.4f}")


if __name__ == "__main__":
    main()
