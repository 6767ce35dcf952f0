"""A small forecast model, so that the demo has a training loop whose losses can be compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

# Forecast on a coarser grid: every byte of a batch is read once, then the convolutions are cheap. A model as
# heavy as the data deserves would hide the hand-over on a machine with few cores.
COARSEN = 8

# Kelvin; rough mean and spread of June over North America.
MEAN, SPREAD = 288.0, 12.0


class Forecast:
    """Predicts the third time step of a crop from the first two, by a correction to the second.

    Two with the same seed that are fed equal batches give equal losses, to the last bit.
    """

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)

    def step(self, batch: np.ndarray) -> float:
        """Train on one batch.

        Parameters
        ----------
        batch : numpy.ndarray
            float32, shape (samples, 3, rows, columns), kelvin.

        Returns
        -------
        float
            Mean squared error before the step, in units of `SPREAD` squared.
        """
        coarse = nn.functional.avg_pool2d(torch.from_numpy(batch), COARSEN)
        fields = (coarse - MEAN) / SPREAD
        known, wanted = fields[:, :2], fields[:, 2:]
        loss = nn.functional.mse_loss(known[:, 1:] + self.net(known), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
