"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from scripts import passes

DATASET = """
import numpy as np, pandas as pd, torchshm, torchshm.data
read_tokens = lambda: np.arange(100_000)
frame = pd.DataFrame({"x": np.ones(10_000), "y": ["text"] * 10_000})
samples = [{"id": i} for i in range(1000)]
"""
README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_examples(tmp_path, monkeypatch):
    """The loader as a script of its own; then the dataset and the store, with something to share and to name."""
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    loader, dataset, store = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    passes(loader, tmp_path)
    passes(
        DATASET
        + dataset
        + "assert torchshm.is_shared(tokens) and frame.equals(frame.copy()) and samples[1] == {'id': 1}\n",
        tmp_path,
    )
    passes(f"import torch, torchshm\nmodel = torch.nn.Linear(3, 2)\n{store}store.close()\n", tmp_path)
