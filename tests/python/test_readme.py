"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from scripts import passes

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_examples(tmp_path, monkeypatch):
    """The loader as a script of its own; then the store, with a model for it to name."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    loader, store = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    passes(loader, tmp_path)
    passes(f"import torch, torchshm\nmodel = torch.nn.Linear(3, 2)\n{store}store.close()\n", tmp_path)
