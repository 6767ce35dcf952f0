"""A small language model of Python source code, trained by all ranks of a node on one array of tokens.

    torchrun --standalone --nproc-per-node 4 notebooks/train_tokens.py
    torchrun --standalone --nproc-per-node 4 notebooks/train_tokens.py --stock

The corpus is the source code of the standard library and of the packages that are installed: 26 million tokens of two bytes by default.
`torchshm.data.once` has one rank read it; the others, and two spawned DataLoader workers of each, use the same bytes. With ``--stock``
each rank reads its own, and pickles it to its workers. Rank 0 prints the losses, and how much memory all processes take together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sysconfig
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import torchshm.data

END = 256  # of a file; other tokens are its bytes
VOCABULARY = END + 1
BLOCK = 128  # tokens


def read_corpus(millions: float) -> np.ndarray:
    """So many million tokens, uint16, of Python files in the order of their paths."""
    tokens = np.empty(int(millions * 1e6), np.uint16)
    at = 0
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            text = np.frombuffer(path.read_bytes() + b"\0", np.uint8)[: len(tokens) - at]
            tokens[at : at + len(text)] = text
            at += len(text)
            tokens[at - 1] = END
            if at == len(tokens):
                return tokens
    return tokens[:at]


class Blocks(Dataset):
    """Blocks of a token array: the tokens, and for each the one that follows."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // BLOCK

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        block = self.tokens[index * BLOCK : (index + 1) * BLOCK + 1].astype(np.int64)
        return torch.from_numpy(block[:-1]), torch.from_numpy(block[1:])


class Model(torch.nn.Module):
    """A GRU over embedded tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.gru = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(tokens))[0])


def pss() -> int:
    """Bytes of this process and its workers; a page that several map counts for each with its share."""
    total = 0
    for pid in [os.getpid()] + [child.pid for child in multiprocessing.active_children()]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def train(tokens: np.ndarray, steps: int, workers: int) -> tuple[list[float], int]:
    """The mean loss over all ranks at each step, and the bytes of all processes after the last."""
    data = Blocks(tokens)
    loader = DataLoader(
        data,
        batch_size=16,
        sampler=DistributedSampler(data, seed=0),
        num_workers=workers,
        multiprocessing_context="spawn",
    )
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, batches = [], iter(loader)
    for _ in range(steps):
        inputs, targets = next(batches)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / torch.distributed.get_world_size()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    memory = torch.tensor([pss()])
    torch.distributed.all_reduce(memory)
    return losses, int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--stock", action="store_true", help="without torchshm: a copy for each rank and worker"
    )
    parser.add_argument("--millions", type=float, default=26.0, help="of tokens; two bytes each")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2, help="of each rank")
    chosen = parser.parse_args()

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    began = time.perf_counter()
    read = partial(read_corpus, chosen.millions)
    tokens = read() if chosen.stock else torchshm.data.once(f"tokens {chosen.millions}", read)
    took = time.perf_counter() - began
    losses, memory = train(tokens, chosen.steps, chosen.workers)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"losses": losses, "memory": memory, "tokens": len(tokens), "read_seconds": took}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
