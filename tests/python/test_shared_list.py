"""A SharedList is a list of what was put in, read from one copy by all processes."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from forked import ended, forked
from peer import Peer, give, keep, kept, kept_value
from same import assert_same
from scripts import METHODS

import torchshm
from torchshm.data import SharedList


def sample(i: int) -> dict:
    return {"id": i, "caption": f"picture {i}", "box": [i / 2, 1.0], "tags": ("a", None, b"c")}


def arrays(i: int) -> dict:
    return {"id": i, "image": np.full((30, 40, 3), i % 256, np.uint8), "small": np.arange(3.0) + i}


SAMPLES = [sample(i) for i in range(2000)]


@pytest.fixture(scope="module")
def samples():
    return SharedList(SAMPLES).seal()


# ---- as a list


def test_items_are_what_was_put_in(samples):
    assert isinstance(samples, Sequence)
    assert len(samples) == 2000 and list(samples) == SAMPLES
    assert samples[0] == SAMPLES[0] and samples[-1] == SAMPLES[-1] and samples[np.int64(7)] == SAMPLES[7]
    assert (
        samples == SAMPLES and samples == samples[:] and samples != SAMPLES[:-1] and samples != SAMPLES[::-1]
    )
    assert SAMPLES[3] in samples and {"id": 3} not in samples
    assert samples.index(SAMPLES[99]) == 99 and samples.count(SAMPLES[99]) == 1
    assert list(reversed(samples)) == SAMPLES[::-1]


def test_each_access_makes_the_item_anew(samples):
    samples[5]["id"] = "changed"
    assert samples[5] == SAMPLES[5]


@pytest.mark.parametrize("index", [2000, -2001, 1 << 62, -(1 << 62), 1 << 80])
def test_an_index_out_of_range_is_an_index_error(samples, index):
    with pytest.raises(IndexError):
        samples[index]


@pytest.mark.parametrize("key", ["1", 1.0, None, (1, 2), [1.5], np.zeros((2, 2), int), b"1", np.array(1.5)])
def test_other_keys_are_type_errors(samples, key):
    with pytest.raises(TypeError, match="SharedList"):
        samples[key]


def test_an_empty_list_is_empty():
    empty = SharedList().seal()
    assert len(empty) == 0 and list(empty) == [] and empty == [] and list(empty[::2]) == []
    assert pickle.loads(torchshm.dumps(empty)) == []
    with pytest.raises(IndexError):
        empty[0]


@pytest.mark.parametrize(
    "key",
    [slice(10, 20), slice(None, None, -3), slice(-5, None), slice(50, 10)],
)
def test_slices_are_lists_over_the_same_memory(samples, key):
    before = torchshm.stats()["blocks"]
    part = samples[key]
    assert isinstance(part, SharedList) and part == SAMPLES[key] and part[1:] == SAMPLES[key][1:]
    assert torchshm.stats()["blocks"] == before
    with pytest.raises(ValueError, match="sealed"):
        part.append(1)


def test_arrays_and_lists_of_numbers_and_bools_choose_items(samples):
    chosen = [5, -1, 5, 0]
    wanted = [SAMPLES[i] for i in chosen]
    assert samples[chosen] == samples[np.array(chosen)] == samples[torch.tensor(chosen)] == wanted
    for one in (np.array([7]), torch.tensor([7])):
        assert type(samples[one]) is SharedList and samples[one] == SAMPLES[7:8]
    assert samples[np.array(7)] == samples[torch.tensor(7)] == SAMPLES[7]
    mask = np.arange(2000) % 7 == 3
    assert samples[mask] == SAMPLES[3::7] == samples[mask.tolist()]
    assert samples[[]] == []
    with pytest.raises(IndexError):
        samples[[2000]]
    with pytest.raises(IndexError):
        samples[[True]]


def test_a_part_keeps_the_memory_of_the_whole(registered):
    whole = SharedList(SAMPLES).seal()
    part = whole[100:110][::2]
    del whole
    gc.collect()
    filler = [torchshm.share(np.zeros(100_000)) for _ in range(5)]
    assert part == SAMPLES[100:110:2]
    del filler


def test_repr_shows_the_beginning(samples):
    assert repr(SharedList([1, 2])) == "<SharedList of 2: [1, 2]>"
    assert repr(samples[:4]).startswith("<SharedList of 4: [{'id': 0") and repr(samples).endswith("...]>")


def test_copies_are_the_same_memory(samples):
    blocks = torchshm.stats()["blocks"]
    for made in (copy.copy(samples), copy.deepcopy({"a": samples})["a"]):
        assert made == samples
    assert torchshm.stats()["blocks"] == blocks


def test_copies_of_an_open_list_are_open():
    items = SharedList([1, "two"])
    for made in (items.copy(), copy.copy(items), copy.deepcopy(items)):
        made.append(3)
        assert made == [1, "two", 3] and not made.sealed
    assert items == [1, "two"] and not items.sealed


def test_lists_are_added():
    items = SharedList([1, 2]).seal()
    zero, three = [0], [3]
    assert items + three == items + SharedList(three) == [1, 2, 3] and zero + items == [0, 1, 2]
    assert type(zero + items) is SharedList
    pair: tuple = (3,)
    with pytest.raises(TypeError):
        items + pair


# ---- appending


def test_a_list_grows_until_it_is_sealed():
    items = SharedList([1])
    items.append("two")
    items.extend(range(3))
    assert not items.sealed and items == [1, "two", 0, 1, 2] and items[1:3] == ["two", 0]
    items.extend(items)
    assert len(items) == 10
    assert items.seal() is items and items.sealed and items.seal() == [1, "two", 0, 1, 2] * 2
    for append in (items.append, lambda x: items.extend([x])):
        with pytest.raises(ValueError, match="sealed"):
            append(3)
    assert len(items) == 10


def test_a_list_that_was_sent_is_sealed(registered):
    items = SharedList([1])
    torchshm.dumps(items)
    with pytest.raises(ValueError, match="sent to another process"):
        items.append(2)


def test_items_come_one_at_a_time():
    class Alive:
        now = most = 0

        def __init__(self):
            Alive.now += 1
            Alive.most = max(Alive.now, Alive.most)

        def __del__(self):
            Alive.now -= 1

        def __reduce__(self):
            return str, ("item",)

    assert SharedList(Alive() for _ in range(1000)) == ["item"] * 1000
    assert Alive.most <= 2


def test_an_item_that_cannot_be_pickled_is_told_and_left_out():
    items = SharedList(range(5))
    with pytest.raises(pickle.PicklingError, match=r"item 7 can't be pickled: .*lambda") as error:
        items.extend([5, 6, lambda: 0, 8])
    assert error.value.__cause__ is not None
    with pytest.raises(pickle.PicklingError, match="item 7"):
        items.append([np.zeros(10_000), threading.Lock()])
    items.append("next")
    assert items.seal() == [*range(7), "next"]


def test_what_is_no_fault_of_pickling_stays_what_it_is():
    class Interrupted:
        def __reduce__(self):
            raise KeyboardInterrupt

    def broken():
        yield 1
        raise OSError("the file ended")

    items = SharedList()
    with pytest.raises(KeyboardInterrupt):
        items.append(Interrupted())
    with pytest.raises(OSError, match="the file ended"):
        items.extend(broken())
    assert items == [1]


def test_an_item_that_appends_to_its_own_list_is_an_error():
    items = SharedList()

    class Appends:
        def __reduce__(self):
            items.append(1)
            return int, ()

    with pytest.raises(RuntimeError, match="appends to this list"):
        items.append(Appends())
    items.append(2)
    assert items == [2]


def test_a_full_pool_is_told_and_leaves_the_list_as_it_was(tmp_path):
    from scripts import passes

    passes(
        """
        import numpy as np, torchshm
        from torchshm.data import SharedList
        torchshm.register(limit="64MiB")
        items = SharedList()
        try:
            items.extend(np.full(1_000_000, i, "u1") for i in range(100))
        except torchshm.PoolFullError as error:
            assert f"item {len(items)}:" in str(error), error
        else:
            raise AssertionError("it is not full")
        assert 40 < len(items) < 67, len(items)
        items.seal()
        assert all((x == i).all() for i, x in enumerate(items))
        """,
        tmp_path,
        PYTHONWARNINGS="ignore",
    )


def test_many_threads_read_while_one_appends():
    items = SharedList([arrays(0)])
    wrong, done = [], threading.Event()

    def read():
        while not done.is_set():
            for i in range(0, len(items), 7):
                if items[i]["id"] != i or items[i]["image"][0, 0, 0] != i % 256:
                    wrong.append(i)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    items.extend(arrays(i) for i in range(1, 3000))
    items.seal()
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong and len(items) == 3000


# ---- arrays and tensors in items


ARRAYS = [
    np.arange(24_000, dtype="f4").reshape(2, 3, 4000),
    np.asfortranarray(np.arange(6000.0).reshape(2, 3000)),
    np.arange(6000.0)[::-2],
    np.arange(3),
    np.array(5.0),
    np.array(["text", None, 3] * 1000, dtype=object),
    np.zeros(1000, dtype=[("a", "i4"), ("b", "f8", 3)]),
    np.array([f"text {i}" for i in range(500)]),
    np.arange(2000, dtype=">i4"),
    np.arange(1000).astype("M8[D]"),
    np.empty((0, 5)),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}-{a.shape}"[:40])
def test_arrays_in_items_are_equal(array):
    items = SharedList([{"a": array}, array])
    expected = pickle.loads(pickle.dumps(array, 5))
    for _ in range(2):
        for got in (items[0]["a"], items[1]):
            if array.dtype.hasobject:
                assert got.tolist() == array.tolist()
            else:
                assert_same(got, expected)
        items.seal()


def test_large_arrays_are_views_of_the_memory_once_it_is_sealed():
    items = SharedList(arrays(i) for i in range(10))
    assert not torchshm.is_shared(items[3]["image"])
    items.seal()
    image = items[3]["image"]
    assert torchshm.is_shared(image) and torchshm.is_shared(items[2:4][1]["image"])
    assert image.ctypes.data % 64 == 0 and image.flags.writeable
    assert not torchshm.is_shared(items[3]["small"])


def test_what_is_written_to_an_array_is_private_and_not_sent(peer):
    items = SharedList(arrays(i) for i in range(10)).seal()
    items[3]["image"][0] = 200
    assert items[3]["image"][0, 0, 0] == 200
    peer.call(keep, "items", items)
    assert peer.call(_mean, 3) == 3.0
    assert peer.call(_write, 3, 77) == 77.0
    assert items[3]["image"][0, 0, 0] == 200 and items[3]["image"][1, 0, 0] == 3
    assert items[4]["image"].mean() == 4 and items[3]["id"] == 3


def test_what_is_written_before_sealing_reaches_nobody():
    items = SharedList([arrays(1)])
    items[0]["image"][:] = 99
    part = items[:]
    part[0]["image"][:] = 99
    items.append(arrays(2))
    items.seal()
    assert items[0]["image"].mean() == 1 and part[0]["image"].mean() == 1 and items[1]["image"].mean() == 2


def test_mode_r_gives_arrays_to_read():
    items = SharedList([arrays(1), torch.arange(5000)], mode="r").seal()
    assert torchshm.is_shared(items[0]["image"]) and not items[0]["image"].flags.writeable
    items[1][0] = 7
    assert items[1][0] == 0
    assert not pickle.loads(torchshm.dumps(items))[0]["image"].flags.writeable
    with pytest.raises(ValueError, match="mode"):
        SharedList(mode="r+")


def test_an_array_that_was_read_only_stays_so():
    array = np.arange(5000.0)
    array.flags.writeable = False
    items = SharedList([array]).seal()
    assert not items[0].flags.writeable and (items[0] == array).all()


TENSORS = [
    torch.arange(5000),
    torch.arange(6000.0).reshape(2, 3000).T,
    torch.ones(3000, dtype=torch.bfloat16),
    torch.zeros(4000, dtype=torch.bool),
    torch.tensor(3.0),
    torch.empty(0, 3),
    torch.arange(3000.0, requires_grad=True),
    torch.nn.Parameter(torch.arange(3000.0)),
    torch.arange(2400.0).reshape(2, 3, 20, 20).to(memory_format=torch.channels_last),
    torch.arange(6000.0)[::2],
    torch.sparse_coo_tensor([[0, 5]], [1.0, 2.0], (10,)),
    torch.ones(3000, dtype=torch.complex64).conj(),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{type(t).__name__}-{t.dtype}-{tuple(t.shape)}")
def test_tensors_in_items_are_equal(tensor):
    items = SharedList([[tensor]])
    for _ in range(2):
        got = items[0][0]
        assert type(got) is type(tensor) and got.dtype == tensor.dtype and got.shape == tensor.shape
        assert got.requires_grad == tensor.requires_grad and got.layout == tensor.layout
        assert torch.equal(got.to_dense().detach().resolve_conj(), tensor.to_dense().detach().resolve_conj())
        items.seal()


def test_the_order_of_a_tensors_dimensions_in_memory_stays():
    tensors = [
        torch.arange(2400.0).reshape(2, 3, 20, 20).to(memory_format=torch.channels_last),
        torch.arange(6000.0).reshape(2, 3000).T,
        torch.ones(4, 1, 500).permute(2, 1, 0),
    ]
    items = SharedList(tensors)
    for _ in range(2):
        assert [x.stride() for x in items] == [x.stride() for x in tensors]
        assert all(map(torch.equal, items, tensors))
        items.seal()
    assert all(map(torchshm.is_shared, items))
    assert SharedList([torch.ones(400).expand(50, 400)])[0].is_contiguous()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_items(layout):
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.ones(500)], layout=layout)
    for items in (SharedList([nested]), SharedList([nested]).seal()):
        assert items[0].is_nested
        assert all(map(torch.equal, items[0].unbind(), nested.unbind()))


def test_large_tensors_are_views_of_the_memory():
    items = SharedList([torch.arange(5000), torch.ones(5000, dtype=torch.bfloat16)]).seal()
    assert torchshm.is_shared(items[0]) and torchshm.is_shared(items[1])
    items[0][0] = 9
    assert items[0][0] == 9


def test_an_array_outlives_its_list():
    image = SharedList([arrays(7)]).seal()[0]["image"]
    gc.collect()
    filler = [torchshm.share(np.zeros(100_000)) for _ in range(5)]
    assert (image == 7).all()
    del filler


# ---- other processes


def _mean(i):
    return float(kept["items"][i]["image"].mean())


def _write(i, value):
    kept["items"][i]["image"][:] = value
    return _mean(i)


def _read(items, pipe):
    pipe.send((list(items), items.sealed, torchshm.is_shared(items[0].get("image"))))
    pipe.close()


@pytest.mark.parametrize("register", [True, False], ids=["registered", "unregistered"])
@pytest.mark.parametrize("method", METHODS)
def test_a_child_gets_it_by_reference(method, register):
    if register:
        torchshm.register()
    try:
        items = SharedList(arrays(i) for i in range(50))
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        child = context.Process(target=_read, args=(items[1:] if register else items, theirs))
        child.start()
        theirs.close()
        got, sealed, shared = ours.recv()
        child.join()
    finally:
        torchshm.unregister()
    assert [x["id"] for x in got] == list(range(register, 50))
    assert all((x["image"] == x["id"]).all() for x in got)
    assert shared or method == "fork" or not sealed


def test_sending_costs_the_same_at_any_length(peer):
    short, long = SharedList(SAMPLES[:100]).seal(), SharedList(sample(i) for i in range(100_000)).seal()
    assert abs(len(torchshm.dumps(long)) - len(torchshm.dumps(short))) < 2000
    chosen = long[np.arange(0, 100_000, 2)]
    assert len(torchshm.dumps(chosen)) < 3000
    got = peer.call(give, chosen)
    assert got[-1] == sample(99_998) and len(got) == 50_000 and got.nbytes == chosen.nbytes
    live = torchshm.stats()["live_bytes"]
    peer.call(keep, "items", long)
    assert torchshm.stats()["live_bytes"] == live


def test_sealing_while_something_is_pickled_leaves_that_as_it_was(registered):
    """An open list is sealed by the pickler that comes across it, in share() and in a queue's put()."""
    small = np.arange(10.0)
    got = torchshm.share({"open": SharedList(arrays(i) for i in range(3)), "small": small}, "r")
    assert torchshm.is_shared(got["small"]) and not got["small"].flags.writeable
    assert got["open"].sealed and got["open"][2]["image"].mean() == 2
    queue = torchshm.get_context("spawn").Queue()
    tickets = []
    for _ in range(5):
        queue.put([SharedList(arrays(i) for i in range(3)), np.arange(5000.0)])
        items, array = queue.get()
        assert items[1]["image"].mean() == 1 and array[-1] == 4999
        tickets.append(torchshm.stats()["tickets"])
    assert len(set(tickets)) == 1, tickets
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("mode", ["c", "r", "r+"])
def test_a_list_inside_what_is_shared_stays_what_it_was(peer, mode):
    got = torchshm.share([SharedList(arrays(i) for i in range(20)).seal()], mode)[0]
    got[3]["image"][:] = 99
    assert got[3]["image"].mean() == 99 and got[4]["image"].mean() == 4
    peer.call(keep, "items", got)
    assert peer.call(_mean, 3) == 3.0


def test_plain_pickle_is_a_copy_that_anybody_can_read(tmp_path):
    items = SharedList(arrays(i) for i in range(20))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        got = pickle.loads(pickle.dumps(items, protocol))
        assert type(got) is SharedList and got.sealed and got[5]["image"].flags.writeable
        assert all((x["image"] == i).all() and x["id"] == i for i, x in enumerate(got))
        assert pickle.loads(torchshm.dumps(got))[7]["id"] == 7
    with torchshm.inline():
        assert not torchshm.is_shared(pickle.loads(torchshm.dumps(items))[3]["image"])
        assert SharedList([arrays(3)]).seal()[0]["image"].mean() == 3


def test_a_child_that_was_forked_appends_to_its_own():
    items = SharedList(range(10))

    def child():
        items.extend([100] * 5000)
        assert list(items) == [*range(10), *[100] * 5000]
        assert list(items.seal()[:11]) == [*range(10), 100]

    pid = forked(child)
    items.extend([200] * 5000)
    assert ended(pid) == 0
    assert list(items) == [*range(10), *[200] * 5000]
    assert items.seal() == [*range(10), *[200] * 5000]


def test_readers_that_are_killed_leave_the_others_their_list(registered):
    items = SharedList(arrays(i) for i in range(500)).seal()
    before = torchshm.stats()["live_bytes"]
    for _ in range(3):
        peer = Peer("spawn")
        peer.call(keep, "items", items)
        peer.ask(_read_for_ever)
        peer.kill()
    assert all((x["image"] == i % 256).all() for i, x in enumerate(items))
    assert torchshm.stats()["live_bytes"] == before


def test_a_maker_that_is_killed_leaves_it_to_the_reader(registered):
    maker = Peer("spawn")
    maker.call(_make, 500)
    items = maker.call(kept_value, "made")
    maker.kill()
    gc.collect()
    filler = [torchshm.share(np.zeros(100_000)) for _ in range(5)]
    assert all((x["image"] == i % 256).all() for i, x in enumerate(items)) and len(items) == 500
    blocks = torchshm.stats()["blocks"]
    del items
    gc.collect()
    assert torchshm.stats()["blocks"] < blocks
    del filler


def _make(n):
    keep("made", SharedList(arrays(i) for i in range(n)))


def _read_for_ever():
    while True:
        list(kept["items"])


def test_damaged_memory_is_an_error():
    items = SharedList(sample(i) for i in range(100)).seal()
    chunks, seen, index, _ = items._parts()
    for entry in (1 << 40, 1 << 39, 12, (1 << 64) - 1):
        damaged = SharedList._over(chunks, seen, np.array([entry], np.uint64), "c")
        with pytest.raises(torchshm.TorchshmError, match=r"item 0 .* can't be read"):
            damaged[0]
    chunk = chunks[0].copy()
    chunk[:8] = 255
    with pytest.raises(torchshm.TorchshmError, match="can't be read"):
        SharedList._over((chunk,), None, index, "c")[0]


# ---- files


def test_json_lines_are_items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in [{"a": 1}, [2, "ü"], None]) + "\n\n")
    assert SharedList.from_jsonl(path) == [{"a": 1}, [2, "ü"], None]
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"items.jsonl, line 3 is no JSON"):
        SharedList.from_jsonl(path)


def test_parquet_rows_are_items(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [{"n": i, "text": f"row {i}", "list": [i, i + 1]} for i in range(1000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    assert SharedList.from_parquet(path) == rows
    assert SharedList.from_parquet(str(path), columns=["n"]) == [{"n": row["n"]} for row in rows]
    with pytest.raises(KeyError, match="missing"):
        SharedList.from_parquet(path, columns=["missing"])
