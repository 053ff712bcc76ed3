"""A sine, fitted from the command line: python regression.py fit --config config.yaml."""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Sine(IterableDataset):
    def __init__(self, samples: int, noise: float):
        self.samples = samples
        self.noise = noise

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.samples):
            x = torch.rand(1, generator=generator) * 6
            yield x, torch.sin(x) + self.noise * torch.randn(1, generator=generator)


class SineDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, samples: int = 320, noise: float = 0.1):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        data = Sine(self.hparams.samples, self.hparams.noise)
        return DataLoader(data, batch_size=self.hparams.batch_size)


class Regressor(L.LightningModule):
    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("train_loss", loss)
        return loss


def cli_main(args=None):
    return LightningCLI(Regressor, SineDataModule, args=args, auto_configure_optimizers=True)


if __name__ == "__main__":
    cli_main()
