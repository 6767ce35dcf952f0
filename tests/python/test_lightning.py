"""Lightning's Trainer over a DataLoader of torchshm and over torch's after register(): the losses are those of torch's alone.

Lightning makes DataLoaders anew, of the same class and arguments, where it needs another sampler.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.utils.data as tud

import torchshm
import torchshm.data

lightning = pytest.importorskip("pytorch_lightning")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 3000  # of a sample: through the pool
WAYS = {
    "register": tud.DataLoader,
    "DataLoader": torchshm.data.DataLoader,
    "pooled": functools.partial(torchshm.data.DataLoader, pooled=True),
}


class Samples(tud.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        x = np.random.default_rng(i).random(SIZE, np.float32)
        return {"x": x, "y": x[:10].sum()}


class Fit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(SIZE, 1)
        self.seen = []

    def loss(self, batch, what):
        loss = torch.nn.functional.mse_loss(self.layer(batch["x"])[:, 0], batch["y"])
        self.seen.append((what, loss.item(), torchshm.is_shared(batch["x"])))
        return loss

    def training_step(self, batch, _):
        return self.loss(batch, "train")

    def validation_step(self, batch, _):
        self.loss(batch, "validate")

    def predict_step(self, batch, _):
        self.seen.append(("predict", 0, torchshm.is_shared(batch["x"])))
        return self.layer(batch["x"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def trained(Loader, folder, **options):
    """Losses and predictions, and whether all batches lay in the pool."""
    lightning.seed_everything(1, verbose=False)
    make = functools.partial(Loader, Samples(), batch_size=8, num_workers=2)
    model = Fit()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, make(shuffle=True, persistent_workers=True), make())
    predicted = torch.cat(trainer.predict(model, make()))
    assert {what for what, _, _ in model.seen} == {"train", "validate", "predict"}
    return (
        [(what, loss) for what, loss, _ in model.seen],
        predicted.tolist(),
        {pooled for _, _, pooled in model.seen},
    )


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 2}], ids=["fit", "overfit_batches"])
def test_losses_and_predictions_are_the_same(tmp_path, options):
    torchshm.unregister()
    stock = trained(tud.DataLoader, tmp_path, **options)
    assert stock[2] == {False}
    for way, Loader in WAYS.items():
        torchshm.register()
        try:
            assert trained(Loader, tmp_path, **options) == (*stock[:2], {True}), way
        finally:
            torchshm.unregister()
