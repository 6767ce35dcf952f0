"""Modules in a store: parameters and buffers are re-pointed to it, so that all processes that have one have one copy of it."""

import io

import psutil
import pytest
import torch
from peer import Peer, keep, kept_value

import torchshm


class Net(torch.nn.Module):
    """With all that can go wrong: tied weights, buffers that a state_dict has and has not, a frozen parameter, an extra state."""

    def __init__(self, size=16, tied=True):
        super().__init__()
        self.emb = torch.nn.Embedding(100, size)
        self.lin = torch.nn.Linear(size, 100)
        if tied:
            self.lin.weight = self.emb.weight
        self.bn = torch.nn.BatchNorm1d(100)
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)
        self.frozen = torch.nn.Parameter(torch.ones(100), requires_grad=False)
        self.told = "nothing"

    def get_extra_state(self):
        return {"told": self.told}

    def set_extra_state(self, state):
        self.told = state["told"]

    def forward(self, i):
        return self.bn(self.lin(self.emb(i))) * self.scale + self.frozen


class Attribute(torch.nn.Module):
    """A plain tensor that no state has, and that a module on the meta device can't have."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(5))
        self.steps = torch.arange(5)

    def forward(self, x):
        return x * self.w + self.steps


class Closed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 3)
        self.activation = lambda x: x * 2


INPUT = torch.arange(10)


def trained():
    torch.manual_seed(3)
    net = Net()
    net.told = "something"
    net(INPUT)  # moves the running mean
    return net.eval()


def on_meta(kind=Net):
    with torch.device("meta"):
        return kind()


def same(a, b):
    return torch.equal(a.eval()(INPUT), b.eval()(INPUT))


def all_shared(module):
    return all(torchshm.is_shared(x) for x in [*module.parameters(), *module.buffers()])


def hold(store, key, kind=None, mode=None):
    net = store.load_module(key, kind, mode=mode, allow_pickle=kind is None)
    keep("net", net)
    return float(sum(x.double().sum() for x in net.parameters()))


def output():
    return kept_value("net").eval()(INPUT).detach().numpy().copy()


def add(name, value):
    with torch.no_grad():
        kept_value("net").get_parameter(name).add_(value)


def pss(pool_id):
    return sum(m.pss for m in psutil.Process().memory_maps() if f"torchshm-{pool_id:016x}-data" in m.path)


@pytest.mark.parametrize("way", ["a module", "on the meta device", "a function", "from nothing"])
def test_a_loaded_module_is_the_saved_one_over_the_stores_memory(store, way):
    net = trained()
    store.save_module("net", net)
    before = store.info()["live_bytes"]
    given = {"a module": Net(), "on the meta device": on_meta(), "a function": Net, "from nothing": None}[way]
    objects = [id(p) for p in given.parameters()] if isinstance(given, torch.nn.Module) else None
    loaded = store.load_module("net", given, allow_pickle=way == "from nothing")
    assert store.info()["live_bytes"] == before and all_shared(loaded)
    assert same(loaded, net) and loaded.told == "something"
    assert loaded.lin.weight is loaded.emb.weight
    assert not loaded.frozen.requires_grad and loaded.lin.bias.requires_grad
    assert loaded.bn.num_batches_tracked == 1 and loaded.scale == 3
    if objects is not None:
        assert loaded is given and [id(p) for p in loaded.parameters()] == objects
    if way == "from nothing":
        assert not loaded.training
    again = store.load_module("net", Net)  # it is the same memory
    assert again.emb.weight.data_ptr() == loaded.emb.weight.data_ptr()


def test_processes_that_serve_one_module_have_one_copy(store):
    size = 64 << 20
    net = torch.nn.Linear(4096, size // 4 // 4096, bias=False)
    store.save_module("net", net)
    peers = [Peer("spawn") for _ in range(4)]
    try:
        sums = {peer.call(hold, store, "net") for peer in peers}
        figures = store.info()
        theirs = [peer.call(pss, figures["pool_id"]) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert sums == {float(net.weight.detach().double().sum())}
    assert all(each > size / 8 for each in theirs), theirs
    assert sum(theirs) <= figures["committed_bytes"] * 1.02


def test_training_stays_in_its_process(store, client):
    store.save_module("net", trained())
    client.call(hold, store, "net", Net)
    before = client.call(output)
    loaded = store.load_module("net", Net)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded.train()(INPUT).sum().backward()
    optimizer.step()
    assert not same(loaded, trained())
    assert (client.call(output) == before).all()
    client.call(hold, store, "net", Net)
    assert (client.call(output) == before).all()
    # A process has one private view of a value.
    assert same(store.load_module("net", Net), loaded)


def test_an_optimizer_made_before_trains_the_loaded_parameters(store):
    store.save_module("net", trained())
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(INPUT).sum().backward()
    optimizer.step()
    store.load_module("net", net)
    assert all_shared(net)
    before = net.bn.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(net.bn.bias, before) and all_shared(net)


def test_hogwild_trains_one_copy(store, client):
    store.save_module("net", trained())
    mine = store.load_module("net", Net(), mode="r+")
    client.call(hold, store, "net", Net, "r+")
    before = mine.lin.bias.detach().clone()
    client.call(add, "lin.bias", 1.0)
    assert torch.equal(mine.lin.bias, before + 1)
    with pytest.raises(ValueError, match="'c' or 'r\\+'"):
        store.load_module("net", Net, mode="r")


def test_a_state_dict_in_parts_makes_one_module(store):
    net = trained()
    state = net.state_dict()
    names = [name for name in state if name != "_extra_state"]
    store["part 1"] = {name: state[name] for name in names[:3]}
    store["part 2"] = {name: state[name] for name in names[3:]} | {"_extra_state": state["_extra_state"]}
    loaded = store.load_module(["part 1", "part 2"], Net)
    assert same(loaded, net) and loaded.told == "something"
    assert loaded.lin.weight is loaded.emb.weight and torchshm.is_shared(loaded.lin.weight)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\): .*bn\.running_mean"):
        store.load_module("part 1", Net())
    partly = store.load_module("part 1", Net(), strict=False)
    assert torch.equal(partly.emb.weight, net.emb.weight) and not torchshm.is_shared(partly.bn.running_mean)
    with pytest.raises(ValueError, match="came with another key already"):
        store.load_module(["part 1", "part 1"], Net)
    with pytest.raises(TypeError, match="needs the module"):
        store.load_module(["part 1", "part 2"])


def test_what_does_not_fit_is_said_and_changes_nothing(store):
    store.save_module("net", trained())
    wide, other = Net(size=8), torch.nn.Linear(16, 100)
    before = [p.detach().clone() for p in wide.parameters()]
    with pytest.raises(RuntimeError, match=r"size mismatch for emb.weight: .*\(100, 16\).*\(100, 8\)"):
        store.load_module("net", wide)
    with pytest.raises(RuntimeError, match="size mismatch"):
        store.load_module("net", wide, strict=False)
    assert all(torch.equal(p, q) for p, q in zip(wide.parameters(), before, strict=True))
    assert not any(torchshm.is_shared(p) for p in wide.parameters())
    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\): .*"emb.weight".*\n.*Missing key\(s\): "weight"'
    ):
        store.load_module("net", other)
    with pytest.raises(KeyError):
        store.load_module("nothing", Net)
    with pytest.raises(TimeoutError):
        store.load_module("nothing", Net, timeout=0.01)
    store["array"] = torch.ones(3)
    with pytest.raises(TypeError, match="neither a module nor a state_dict"):
        store.load_module("array", Net)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        store.save_module("x", {"w": torch.ones(3)})
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        store.load_module("net", dict)
    with pytest.raises(torchshm.KeyExistsError):
        store.save_module("net", Net())
    store.save_module("net", Net(), overwrite=True)
    with pytest.raises(ValueError, match="no shape yet"):
        store.save_module("lazy", torch.nn.LazyLinear(3))
    assert sorted(store) == ["array", "net"]


def test_nothing_is_unpickled_unless_that_is_said(store):
    store.save_module("net", trained())
    with pytest.raises(ValueError, match="allow_pickle=True"):
        store.load_module("net")
    store.save_module("closed", Closed())
    with pytest.raises(ValueError, match=r"could not be pickled.*lambda"):
        store.load_module("closed", allow_pickle=True)
    assert torchshm.is_shared(store.load_module("closed", Closed).lin.weight)
    store["state"] = trained().state_dict()
    with pytest.raises(ValueError, match="no module but other values"):
        store.load_module("state", allow_pickle=True)


def test_what_the_meta_device_can_not_have_is_made_by_the_function(store):
    store.save_module("m", Attribute())
    loaded = store.load_module("m", Attribute)
    assert torch.equal(loaded(torch.ones(5)), Attribute()(torch.ones(5))) and torchshm.is_shared(loaded.w)
    with pytest.raises(RuntimeError, match='On the meta device, and not in the store: "steps"'):
        store.load_module("m", on_meta(Attribute))
    store["state"] = trained().state_dict()  # without `scale`
    assert same(store.load_module("state", Net), trained())
    with pytest.raises(RuntimeError, match='not in the store: "scale"'):
        store.load_module("state", on_meta())


def test_weights_that_are_tied_in_the_store_only_are_not_tied_by_loading(store):
    store.save_module("net", trained())
    loaded = store.load_module("net", lambda: Net(tied=False))
    with torch.no_grad():
        loaded.lin.weight.zero_()
    assert torch.equal(loaded.emb.weight, trained().emb.weight)
    store.save_module("apart", Net(tied=False))
    tied = store.load_module("apart", Net())
    assert tied.lin.weight is tied.emb.weight and all_shared(tied)


def test_the_dtype_is_that_of_what_was_saved(store):
    store.save_module("half", trained().half())
    net = Net()
    weight = net.lin.bias
    weight.mark = "kept"
    loaded = store.load_module("half", net)
    assert loaded.lin.bias is weight and weight.dtype == torch.float16 and weight.mark == "kept"
    assert all_shared(loaded) and loaded.lin.bias.requires_grad


def test_a_loaded_module_is_saved_by_torch_and_by_the_store(store):
    net = trained()
    store.save_module("net", net)
    loaded = store.load_module("net", Net)
    file = io.BytesIO()
    torch.save(loaded.state_dict(), file)
    assert file.tell() < 4 * sum(x.nbytes for x in net.state_dict().values() if isinstance(x, torch.Tensor))
    file.seek(0)
    copy = Net()
    copy.load_state_dict(torch.load(file))
    assert same(copy, net)
    before = store.info("net")["bytes"], store.info()["live_bytes"]
    store.save_module("again", loaded)  # only named
    assert store.info()["live_bytes"] - before[1] < before[0]
    assert same(store.load_module("again", allow_pickle=True), net)
