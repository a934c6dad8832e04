"""Fine-tune a model that is already sparse, from any source: its zeros stay, through AdamW and weight decay.

python examples/transformers_hold.py
"""

import tempfile

import torch
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pomona
from pomona.integrations.transformers import PrunerCallback


def one_shot(model: torch.nn.Module) -> torch.nn.Module:
    """Set 60 % of each layer to zero; stands for SparseGPT, Wanda, torch.nn.utils.prune, or a file."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.6)
            prune.remove(module, "weight")
    return model


def main(num_steps: int = 30) -> PrunerCallback:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = one_shot(LlamaForCausalLM(config))  # or from_pretrained("a sparse model")
    texts = torch.randint(64, (256, 16), generator=torch.Generator().manual_seed(1))
    callback = PrunerCallback()  # no method: hold the existing zeros
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=num_steps,
            learning_rate=1e-3,
            weight_decay=0.1,
            bf16=True,
            gradient_accumulation_steps=2,
            logging_steps=10,
            save_strategy="no",
            use_cpu=True,
        )
        data = [{"input_ids": text, "labels": text} for text in texts]
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    print(callback.report)
    callback.pruner.verify()  # raises if a zero has come back
    print(pomona.report(model, pomona.Scope(include=["model.layers.*"])).sparsity)
    return callback


if __name__ == "__main__":
    main()
