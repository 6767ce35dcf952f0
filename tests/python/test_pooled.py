"""Inside pooled() numpy allocates in the pool, object arrays never, and outside of it nothing is different."""

from __future__ import annotations

import asyncio
import gc
import io
import threading

import numpy as np
import pytest
from numpy._core.multiarray import get_handler_name
from peer import Peer, give, keep, kept

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

A = np.arange(6000.0).reshape(60, 100)
B = A[::-1] + 1


def stored(save, load):
    file = io.BytesIO()
    save(file, A)
    file.seek(0)
    return load(file)


IN_POOL = {
    "empty": lambda: np.empty((3, 4)),
    "full": lambda: np.full(500, 3.0),
    "ones": lambda: np.ones(500),
    "arange": lambda: np.arange(500),
    "linspace": lambda: np.linspace(0, 1, 500),
    "array of a list": lambda: np.array([1, 2, 3]),
    "copy": lambda: A.copy(),
    "copy of a strided one": lambda: A[::3, ::-1].copy("F"),
    "stack": lambda: np.stack([A, B]),
    "concatenate": lambda: np.concatenate([A, B], axis=1),
    "sum of two": lambda: A + B,
    "expression": lambda: np.sqrt(A * B + A.mean(axis=0)).clip(0, 9),
    "matrix product": lambda: A @ B.T,
    "einsum": lambda: np.einsum("ij,kj->ik", A, B),
    "astype": lambda: A.astype("f4"),
    "fancy index": lambda: A[[3, 1, 2]],
    "mask": lambda: A[A > 5],
    "where": lambda: np.where(A > 5, A, B),
    "sort": lambda: np.sort(B, axis=0),
    "argsort": lambda: np.argsort(B[:, 0]),
    "unique": lambda: np.unique(A),
    "repeat": lambda: np.repeat(A, 3),
    "fromiter": lambda: np.fromiter(range(5000), "i4"),
    "fromstring": lambda: np.fromstring("1 2 3", sep=" "),
    "random": lambda: np.random.default_rng(1).random((50, 60)),
    "normal": lambda: np.random.default_rng(1).standard_normal(5000, "f4"),
    "load": lambda: stored(np.save, np.load),
    "savetxt and loadtxt": lambda: stored(np.savetxt, np.loadtxt),
    "fft": lambda: np.fft.fft(A),
    "inverse": lambda: np.linalg.inv(np.eye(40) + 1),
    "masked": lambda: (np.ma.array(A, mask=A > 5) + 1).data,
    "pad": lambda: np.pad(A, 3, mode="edge"),
    "structs": lambda: np.empty(50, [("a", "i4"), ("b", "f8")]),
    "dates": lambda: np.arange("2020-01", "2024-01", dtype="M8[D]"),
}


@pytest.mark.parametrize("name", IN_POOL)
def test_result_lands_in_the_pool_and_is_what_it_always_is(peer, name):
    wanted = IN_POOL[name]()
    gc.collect()
    before = torchshm.stats()["blocks"]
    with torchshm.pooled():
        got = IN_POOL[name]()
    assert torchshm.is_shared(got)
    if name != "empty" and name != "structs":
        np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype
    assert got.strides == wanted.strides
    assert torchshm.is_shared(peer.call(give, got))
    peer.call(keep, "x", got)
    own = torchshm.stats()["blocks"]
    del got
    peer.forget()
    gc.collect()
    assert own > before
    assert torchshm.stats()["blocks"] == before


def test_result_costs_nothing_to_send(peer):
    with torchshm.pooled():
        x = np.stack([A, B])
    peer.call(keep, "x", x)
    before = torchshm.stats()["live_bytes"]
    assert peer.call(_live_bytes_and_write, "x") == before
    assert x[1, 0, 0] == -5


def _live_bytes_and_write(name):
    kept[name][1, 0, 0] = -5
    return torchshm.stats()["live_bytes"]


def test_zeros_is_the_documented_exception():
    with torchshm.pooled():
        assert not torchshm.is_shared(np.zeros(10_000))
        assert not torchshm.is_shared(np.array(["one", "two"]))  # numpy asks for zero-filled memory here too
        assert torchshm.is_shared(np.full(10_000, 0.0))


def test_nothing_is_pooled_outside():
    handler = get_handler_name()
    with torchshm.pooled():
        assert get_handler_name() == "torchshm"
        inside = np.ones(5)
    assert get_handler_name() == handler
    assert not torchshm.is_shared(np.ones(5))
    assert not torchshm.is_shared(inside + 1)
    assert torchshm.is_shared(inside)


def test_nested_blocks_end_one_by_one():
    with torchshm.pooled():
        with torchshm.pooled():
            assert torchshm.is_shared(np.ones(5))
        assert torchshm.is_shared(np.ones(5))
    assert not torchshm.is_shared(np.ones(5))


def test_exception_ends_the_block():
    with pytest.raises(KeyError), torchshm.pooled():
        raise KeyError
    assert not torchshm.is_shared(np.ones(5))


def test_new_threads_start_without_and_have_their_own():
    seen = []

    def work():
        seen.append(torchshm.is_shared(np.ones(5)))
        with torchshm.pooled():
            seen.append(torchshm.is_shared(np.ones(5)))
        seen.append(torchshm.is_shared(np.ones(5)))

    with torchshm.pooled():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torchshm.is_shared(np.ones(5))
    assert seen == [False, True, False]


def test_asyncio_tasks_keep_the_setting_they_were_made_in():
    async def shared():
        await asyncio.sleep(0)
        return torchshm.is_shared(np.ones(5))

    async def main():
        outside = asyncio.create_task(shared())
        with torchshm.pooled():
            inside = asyncio.create_task(shared())
            here = await shared()
        return await outside, await inside, here, await shared()

    assert asyncio.run(main()) == (False, True, True, False)


def test_generator_has_the_setting_of_who_runs_it():
    def generate():
        while True:
            yield torchshm.is_shared(np.ones(5))

    generator = generate()
    assert next(generator) is False
    with torchshm.pooled():
        assert next(generator) is True
    assert next(generator) is False


@pytest.mark.parametrize("sizes", [[10, 100_000], [100_000, 10], [5, 600, 20, 300_000, 1, 50_000, 0, 70]])
def test_resize_in_place_keeps_the_content(sizes):
    with torchshm.pooled():
        x = np.empty(sizes[0])
        x[...] = wanted = np.arange(float(sizes[0]))
        for size in sizes[1:]:
            x.resize(size, refcheck=False)
            wanted = wanted.copy()
            wanted.resize(size, refcheck=False)
            np.testing.assert_array_equal(x, wanted)
    before = torchshm.stats()["blocks"]
    x.resize(123_456, refcheck=False)  # grows outside of the block too
    x[-1] = 1
    assert x[: sizes[-1]].tolist() == wanted.tolist()
    del x
    assert torchshm.stats()["blocks"] <= before


def test_resize_of_what_others_have_does_not_move_it_under_them(peer):
    with torchshm.pooled():
        x = np.full(1000, 7.0)
    peer.call(keep, "x", x)
    x.resize(500_000, refcheck=False)
    x[...] = 1
    assert peer.call(_content, "x") == [7.0] * 1000 or peer.call(_content, "x") == [1.0] * 1000
    fresh = [torchshm.share(np.zeros(1000)) for _ in range(10)]
    assert peer.call(_content, "x") == [7.0] * 1000
    del fresh


def _content(name):
    return kept[name].tolist()


def test_arrays_made_inside_and_dropped_outside_and_the_other_way_round():
    before = torchshm.stats()["blocks"]
    outside = [np.ones(n) for n in range(1, 5000, 100)]
    with torchshm.pooled():
        inside = [np.ones(n) for n in range(1, 5000, 100)]
        outside = [x + y for x, y in zip(inside, outside, strict=True)]
    assert all(map(torchshm.is_shared, outside))
    del inside
    outside = [x.sum() for x in outside]
    gc.collect()
    assert torchshm.stats()["blocks"] == before


def test_forked_child_inside_and_outside():
    with torchshm.pooled():
        x = np.full(5000, 3.0)
        with Peer("fork") as child:
            got = child.call(_make_and_drop)
            assert torchshm.is_shared(got)
            assert got.sum() == 15_000
            assert x.sum() == 15_000
    assert x.sum() == 15_000


def _make_and_drop():
    for n in range(50):
        np.ones(n * 100) + 1
    with torchshm.pooled():
        return np.full(5000, 3.0)
