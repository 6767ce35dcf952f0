"""Tensors travel in the pool, with torch's own semantics: both sides see what either writes."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from parity import DTYPES
from peer import give, keep, kept
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, Dataset

import torchshm
from torchshm import _tensors

pytestmark = [
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation"),
    pytest.mark.filterwarnings("ignore:.*Sparse (CSR|CSC|BSR|BSC|invariant)"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype"),
]

ROWS = 3000


def add_one(name):
    kept[name].add_(1)


def first(name):
    return kept[name].flatten()[0].item()


def live_blocks():
    gc.collect()
    return torchshm.stats()["blocks"]


def same(a, b):
    """Whether two tensors are the same in all that a program can tell."""
    assert type(a) is type(b)
    assert (a.dtype, a.layout, a.dim(), a.requires_grad) == (b.dtype, b.layout, b.dim(), b.requires_grad)
    assert (a.is_conj(), a.is_neg(), a.is_leaf) == (b.is_conj(), b.is_neg(), b.is_leaf)
    if a.is_nested:
        assert all(torch.equal(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True))
    elif a.layout is torch.strided:
        assert (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
        if a.is_quantized:
            assert a.qscheme() == b.qscheme()
            a, b = a.int_repr(), b.int_repr()
        a, b = a.detach().resolve_conj().resolve_neg(), b.detach().resolve_conj().resolve_neg()
        a, b = a.contiguous(), b.contiguous()
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dim() else a.item() == b.item()
    else:
        assert torch.equal(a.to_dense(), b.to_dense())
    return True


def numbers(*shape):
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def compressed(layout, **options):
    return torch.eye(64).to_sparse(layout=layout, **options)


STRIDED = {
    "contiguous": lambda: numbers(ROWS, 4),
    "small": lambda: numbers(3),
    "scalar": lambda: torch.tensor(2.5),
    "transposed": lambda: numbers(ROWS, 4).t(),
    "part": lambda: numbers(ROWS, 4)[5:90:3, 1:],
    "expanded": lambda: numbers(ROWS, 1).expand(ROWS, 8),
    "channels last": lambda: numbers(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "flipped": lambda: numbers(ROWS).flip(0),
    "grad": lambda: numbers(ROWS).requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(numbers(ROWS)),
    "parameter without grad": lambda: torch.nn.Parameter(torch.arange(ROWS), requires_grad=False),
    "conj": lambda: torch.complex(numbers(ROWS), numbers(ROWS)).conj(),
    "neg": lambda: torch.complex(numbers(ROWS), numbers(ROWS)).conj().imag,
    "from numpy": lambda: torch.from_numpy(np.arange(ROWS)),
}
OTHERS = {
    "empty": lambda: torch.empty(0, 3),
    "coo": lambda: torch.eye(64).to_sparse(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor([[1, 1], [2, 2]], [1.0, 2.0], (4, 4)),
    "csr": lambda: compressed(torch.sparse_csr),
    "csc": lambda: compressed(torch.sparse_csc),
    "bsr": lambda: compressed(torch.sparse_bsr, blocksize=(2, 2)),
    "bsc": lambda: compressed(torch.sparse_bsc, blocksize=(2, 2)),
    "nested": lambda: torch.nested.nested_tensor([numbers(3), numbers(5)]),
    "quantised": lambda: torch.quantize_per_tensor(numbers(ROWS), 0.1, 3, torch.quint8),
    "quantised by channel": lambda: torch.quantize_per_channel(
        numbers(8, 4), torch.arange(1.0, 9.0), torch.arange(8), 0, torch.qint8
    ),
    "meta": lambda: torch.empty(ROWS, device="meta"),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_a_tensor_arrives_as_it_was(peer, kind):
    x = STRIDED[kind]()
    got = peer.call(give, x)
    assert same(got, x)
    assert torchshm.is_shared(got) and torchshm.is_shared(x)


@pytest.mark.parametrize("kind", sorted(set(OTHERS) - {"meta"}))
def test_so_do_the_other_kinds(peer, kind):
    x = OTHERS[kind]()
    assert same(peer.call(give, x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives(peer, dtype):
    x = (
        torch.arange(ROWS * 16, dtype=torch.uint8).view(dtype)
        if dtype is not torch.bool
        else numbers(ROWS) > 3
    )
    assert same(peer.call(give, x), x)


@pytest.mark.parametrize("kind", ["contiguous", "part", "grad", "parameter"])
def test_usual_tensors_are_reduced_without_python(kind):
    module = _tensors.compiled()
    assert module.reduce_tensor(STRIDED[kind]())[0] is module.tensor


def test_a_tensor_on_the_meta_device_goes_as_torch_sends_it(peer):
    got = peer.call(give, OTHERS["meta"]())
    assert got.is_meta and got.shape == (ROWS,)


def test_both_sides_see_what_either_writes(peer, other):
    x = torch.zeros(ROWS)
    peer.call(keep, "x", x)
    other.call(keep, "x", x)
    x.add_(1)
    peer.call(add_one, "x")
    other.call(add_one, "x")
    assert x[0] == peer.call(first, "x") == other.call(first, "x") == 3


def test_sending_moves_a_storage_in_place(peer):
    """Views that were there before see what the receiver writes; so does who gets it next, and nothing is copied twice."""
    x = torch.zeros(ROWS, 4)
    view, address = x[2:4], x.data_ptr()
    peer.call(keep, "x", x)
    assert x.data_ptr() != address and view.data_ptr() == x.data_ptr() + 2 * 4 * 4
    blocks, address = live_blocks(), x.data_ptr()
    peer.call(keep, "again", x)
    assert x.data_ptr() == address and live_blocks() == blocks
    peer.call(add_one, "again")
    assert view[0, 0] == 1 and peer.call(first, "x") == 1


def test_what_was_received_goes_on_as_the_same_memory(peer, other):
    peer.call(keep, "x", torch.zeros(ROWS))
    x = peer.call(give, torch.zeros(ROWS))
    other.call(keep, "x", x)
    x.add_(5)
    assert other.call(first, "x") == 5


def test_views_of_one_storage_stay_views_of_one(peer):
    x = numbers(ROWS)
    a, b, c = peer.call(give, [x, x[10:20], x.view(-1, 4).t()])
    a[10] = -7
    assert b[0] == -7
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == c.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_argument_of_a_process_is_the_same_memory(method):
    context = multiprocessing.get_context(method)
    x = torch.zeros(ROWS)
    x.share_memory_() if method == "fork" else None
    child = (
        context.Process(target=x.add_, args=(1,))
        if method == "fork"
        else context.Process(target=add_to, args=(x,))
    )
    child.start()
    child.join()
    assert child.exitcode == 0 and x[0] == 1


def add_to(x):
    x.add_(1)


def test_a_pooled_tensor_is_the_same_memory_in_a_forked_child():
    with torchshm.pooled():
        x = torch.zeros(ROWS)
    child = multiprocessing.get_context("fork").Process(target=add_to, args=(x,))
    child.start()
    child.join()
    assert child.exitcode == 0 and x[0] == 1


def test_memory_comes_back_with_the_last_tensor(peer):
    before = live_blocks()
    x = torch.zeros(1 << 20)
    peer.call(keep, "x", x)
    y = peer.call(give, x[:10])
    assert live_blocks() > before
    del x, y
    peer.forget()
    assert live_blocks() == before


def test_numpy_and_torch_look_at_one_memory():
    with torchshm.pooled():
        x, a = torch.ones(ROWS), np.ones(ROWS)
    assert torchshm.is_shared(x.numpy()) and torchshm.is_shared(torch.from_numpy(a))
    assert torchshm.loads(torchshm.dumps(x.numpy())).__array_interface__["data"][0] == x.data_ptr()
    y = torchshm.loads(torchshm.dumps(torch.from_numpy(a)))
    y[0] = 9
    assert a[0] == 9


def test_an_array_that_came_in_a_message_is_the_receivers_own_also_as_a_tensor(peer, other):
    a = peer.call(give, np.ones(ROWS))
    x = torch.from_numpy(a)
    other.call(keep, "x", x)
    a[...] = 2  # torch moves the tensor's memory, and not the array's
    assert other.call(first, "x") == 1


def test_errors_are_torchs(peer):
    x = torch.ones(ROWS, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match="non-leaf tensor"):
        torchshm.dumps(x)
    hooked = torch.ones(ROWS, requires_grad=True)
    hooked.register_hook(print)
    with pytest.warns(UserWarning, match="backward hook"):
        torchshm.dumps(hooked)


def test_what_torch_has_shared_goes_torchs_way(peer):
    x = torch.zeros(ROWS).share_memory_()
    assert x.is_shared() and not torchshm.is_shared(x)
    peer.call(keep, "x", x)
    peer.call(add_one, "x")
    assert x[0] == 1 and not torchshm.is_shared(x)


def test_a_pooled_tensor_behaves():
    with torchshm.pooled():
        x = torch.ones(ROWS)
    assert x.is_shared() and x.share_memory_() is x and torchshm.is_shared(x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file), x)
    assert torch.equal(copy.deepcopy(x), x) and torch.equal(pickle.loads(pickle.dumps(x)), x)
    x.resize_(2 * ROWS)
    assert x.shape == (2 * ROWS,) and x[0] == 1
    torchshm.dumps(x)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.resize_(10 * ROWS)  # others may look at it: as torch has it for what it shares


def test_a_subclass_and_a_module_arrive(peer):
    net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40))
    got = peer.call(give, net)
    assert all(same(a, b) for a, b in zip(got.state_dict().values(), net.state_dict().values(), strict=True))
    buffer = torch.nn.Buffer(torch.ones(ROWS))
    assert torch.equal(peer.call(give, buffer), buffer)


def test_pooled_is_for_one_thread_and_ends():
    from threading import Thread

    elsewhere = []
    with torchshm.pooled():
        thread = Thread(target=lambda: elsewhere.append(torch.ones(ROWS)))
        thread.start()
        thread.join()
        inside = torch.cat([torch.ones(ROWS), torch.ones(ROWS)])
        with torchshm.pooled():
            pass
        still = torch.empty(ROWS)
    assert torchshm.is_shared(inside) and torchshm.is_shared(still)
    assert not torchshm.is_shared(elsewhere[0]) and not torchshm.is_shared(torch.ones(ROWS))


def test_share_gives_every_process_its_own_writes(peer):
    x = torch.ones(ROWS)
    shared = torchshm.share({"x": x})["x"]
    assert torchshm.is_shared(shared) and not torchshm.is_shared(x)
    peer.call(keep, "x", shared)
    shared[0] = 5
    assert peer.call(first, "x") == 1 and x[0] == 1


def test_inline_is_a_copy_inside_the_pickle():
    x = numbers(ROWS)
    with torchshm.inline():
        pickled = torchshm.dumps(x)
    assert len(pickled) > x.nbytes
    got = torchshm.loads(pickled)
    got[0] = 9
    assert x[0] == 0 and not torchshm.is_shared(x)


def test_a_damaged_handle_is_an_error():
    pickled = torchshm.dumps(numbers(ROWS))
    at = pickled.index(b"storage") + 40
    for i in range(at, at + 40):
        damaged = pickled[:i] + bytes([pickled[i] ^ 1]) + pickled[i + 1 :]
        if damaged == pickled:
            continue
        with pytest.raises(Exception, match=r".") as caught:
            torchshm.loads(damaged)
        assert not isinstance(caught.value, SystemError)
    assert torchshm.loads(pickled)[5] == 5


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (ROWS + 1,), None),
        (1, (ROWS,), None),
        (0, (2,), (1 << 62,)),
        (0, (1 << 40, 1 << 40), None),
        (0, (-1,), None),
        (-1, (1,), None),
        (0, (2, 2), (1,)),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(arguments):
    storage = torch.zeros(ROWS).untyped_storage()
    offset, size, stride = arguments
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        _tensors.compiled().tensor(storage, torch.float32, offset, size, stride, 0)


def test_a_full_pool_sends_as_torch_does():
    program = """
import torch, torchshm, warnings
from multiprocessing.reduction import ForkingPickler
torchshm.register(limit="4MiB")
small, large = torch.ones(1000), torch.ones(8 << 20)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sent = ForkingPickler.dumps([small, large])
assert torchshm.is_shared(small) and not torchshm.is_shared(large) and large.is_shared(), (small, large)
assert any("limit" in str(w.message) for w in caught), caught
a, b = ForkingPickler.loads(sent)
b[0] = 5
assert large[0] == 5 and a[0] == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.parametrize("order", ["before", "after", "unregistered"])
def test_it_does_not_matter_when_torch_is_imported(order):
    program = f"""
import sys
if {order!r} != "after":
    import torch
import torchshm
torchshm.register()
assert ("torch" in sys.modules) == ({order!r} != "after")
import torch
from multiprocessing.reduction import ForkingPickler
stock = torch.multiprocessing.reductions.reduce_tensor
assert ForkingPickler._extra_reducers[torch.Tensor] is not stock
if {order!r} == "unregistered":
    torchshm.unregister()
    assert ForkingPickler._extra_reducers[torch.Tensor] is stock
    assert ForkingPickler._extra_reducers[torch.UntypedStorage] is torch.multiprocessing.reductions.reduce_storage
x = torch.ones(1000)
ForkingPickler.dumps(x)
assert torchshm.is_shared(x) == ({order!r} != "unregistered") and x.is_shared()
assert torchshm.is_shared(torch.ones(1).new(torch.UntypedStorage._new_shared(100))) == ({order!r} != "unregistered")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_build_for_another_torch_is_left_alone():
    program = """
import torch, warnings
torch.__version__ = "1.0.0"
import torchshm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torchshm.register()
assert any("built for torch" in str(w.message) for w in caught), caught
from multiprocessing.reduction import ForkingPickler
x = torch.ones(1000)
assert ForkingPickler.loads(ForkingPickler.dumps(x))[0] == 1
assert x.is_shared() and not torchshm.is_shared(x)
with torchshm.pooled():
    assert not torchshm.is_shared(torch.ones(1000))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


class Samples(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((3, 20, 20), float(index)), "y": index}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("workers", [0, 2])
def test_default_collate_makes_its_batches_in_the_pool(method, workers):
    context = method if workers else None
    batches = list(DataLoader(Samples(), 8, num_workers=workers, multiprocessing_context=context))
    for i, batch in enumerate(batches):
        assert torch.equal(batch["y"], torch.arange(8 * i, 8 * i + 8))
        assert torch.equal(batch["x"][:, 0, 0, 0], batch["y"].float())
        assert torchshm.is_shared(batch["x"]) == (workers > 0)


def test_torchs_own_reducers_still_read_what_they_wrote(peer):
    """A message that was pickled before register() is received after it."""
    torchshm.unregister()
    x = torch.zeros(ROWS)
    function, arguments = reductions.reduce_tensor(x)
    torchshm.register()
    assert torch.equal(function(*arguments), x)
