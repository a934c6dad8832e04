"""Fine-tune a transformer with the Trainer and prune it to 80 % on the way; if you kill it, it resumes.

python examples/transformers_trainer.py [FOLDER]
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import pomona
from pomona.integrations.transformers import PrunerCallback


class WhichComesFirst(torch.utils.data.Dataset):
    """Sentences of ten words; the label says whether word 1 comes before word 2."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(3, 30, (size, 10), generator=generator)
        self.labels = torch.randint(2, (size,), generator=generator)
        for words, label in zip(self.words, self.labels, strict=True):
            first, second = torch.randperm(10, generator=generator)[:2].sort().values
            words[first], words[second] = (1, 2) if label else (2, 1)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def main(folder: str = "runs/trainer", num_steps: int = 600) -> PrunerCallback:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=10,
    )
    model = BertForSequenceClassification(config)  # or from_pretrained(...)
    args = TrainingArguments(
        folder,
        max_steps=num_steps,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        logging_steps=50,
        save_steps=100,
        save_total_limit=2,
        use_cpu=True,
    )
    # From dense to 80 % zeros over the first two thirds; the remaining steps recover the accuracy.
    method = pomona.Magnitude(pomona.Cubic(0.0, 0.8, steps=2 * num_steps // 3), every=10)
    callback = PrunerCallback(method, scope=pomona.Scope(exclude=["*embeddings*", "classifier"]))
    trainer = Trainer(
        model,
        args,
        train_dataset=WhichComesFirst(2048, seed=0),
        eval_dataset=WhichComesFirst(512, seed=1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    print(callback.report)
    print(trainer.evaluate())  # evaluates the sparse model
    trainer.save_model(f"{folder}/sparse")  # an ordinary model with exact zeros
    return callback


if __name__ == "__main__":
    main(*sys.argv[1:2])
