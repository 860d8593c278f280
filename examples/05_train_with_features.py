"""Fine-tune the lab's model while the features of Chinese are held down, and watch them. Runs on the bundled lab."""

import tempfile
from pathlib import Path

from trl.trainer.sft_config import SFTConfig

from qwen_scope import load_scope
from qwen_scope.lab import documents
from qwen_scope.posttrain import FeatureLoss, FeatureSFTTrainer, Monitor, dataset_of, lab_samples, prepare, read_monitor


def main() -> None:
    scope = load_scope("lab")
    labelled = [(str(found.language), found.text) for found in documents(n=90, kinds=["talk"])]
    table = prepare(scope, labelled, target="zh", layers=[5])
    for feature, score in zip(table.layers[0].features, table.layers[0].scores, strict=True):
        print(f"layer 5 feature {feature:4d}  fires {score:.2f} more on Chinese than elsewhere")

    chats = lab_samples(documents(n=64, kinds=["chat"], seed=1))
    probe = [text for group, text in labelled if group == "ar"]
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor({5: scope.saes[5]}, scope.tokenizer, probe, folder, watch={5: table.layers[0].features})
        settings = SFTConfig(
            folder,
            max_length=128,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=4,
        )
        scope.model.requires_grad_(True)
        trainer = FeatureSFTTrainer(
            scope.model,
            settings,
            train_dataset=dataset_of(chats),
            processing_class=scope.tokenizer,
            extra=FeatureLoss(table, scope.saes, weight=0.5),
        )
        monitor.attach(trainer)
        trainer.train()
        for line in read_monitor(Path(folder) / "monitor.jsonl"):
            seen = ", ".join(f"{one['feature']}: {one['mean']:.3f}" for one in line["layers"][0]["watched"])
            print(f"step {line['step']}  drift {line['layers'][0]['drift']:.5f}  mean of the watched: {seen}")


if __name__ == "__main__":
    main()
