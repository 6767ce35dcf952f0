"""share(consume=True): the argument's arrays are replaced one by one, so that the peak is not twice the argument."""

from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scripts import passes
from shareable import (
    CASES,
    N,
    Sample,
    Slotted,
    dataset,
    mixed_frame,
    nested,
    nested_equal,
    nested_memory,
    rng,
)

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

PEAK = """
import sys, types
import numpy as np
{imports}
import torchshm
PARTS, SIZE = 24, 8 << 20
def array(i):
    return np.full(SIZE // 8, float(i))
def of(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) << 10
torchshm.share(array(0))
x = {make}
before = of("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
y = torchshm.share(x, consume={consume})
peak = of("VmHWM") - before
whole = PARTS * SIZE
assert {bound}, f"{{peak / whole}} of the object"
assert torchshm.stats()["live_bytes"] >= whole
"""

KINDS = {
    "dict": ("", "{i: array(i) for i in range(PARTS)}"),
    "attributes and lists": (
        "",
        "[types.SimpleNamespace(a=array(i), b=[array(i)]) for i in range(PARTS // 2)]",
    ),
    "xarray": ("import xarray as xr", "xr.Dataset({f'v{i}': ('x', array(i)) for i in range(PARTS)})"),
    "pandas": (
        "import pandas as pd",
        "pd.concat([pd.DataFrame({f'v{i}': array(i)}) for i in range(PARTS)], axis=1)",
    ),
    "tables in a dict": (
        "import pyarrow as pa",
        "{i: pa.table({'a': array(i)}) for i in range(PARTS)}",
    ),
    "torch": (
        "import torch",
        "torch.nn.ModuleList([torch.nn.Linear(1024, 2048) for i in range(PARTS)])",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peak_is_the_object_and_not_twice_the_object(tmp_path, kind):
    imports, make = KINDS[kind]
    passes(PEAK.format(imports=imports, make=make, consume=True, bound="peak < 0.6 * whole"), tmp_path)


def test_peak_is_twice_the_object_otherwise(tmp_path):
    """That the measurement above can tell."""
    imports, make = KINDS["dict"]
    passes(PEAK.format(imports=imports, make=make, consume=False, bound="peak > 0.9 * whole"), tmp_path)


def test_polars_columns_are_replaced_in_the_frame(tmp_path):
    pytest.importorskip("polars")
    make = "pl.DataFrame({f'v{i}': array(i) for i in range(PARTS)})"
    passes(
        PEAK.format(
            imports="import polars as pl, pyarrow", make=make, consume=True, bound="peak < 0.6 * whole"
        ),
        tmp_path,
    )


@pytest.mark.parametrize("name", CASES)
def test_argument_stays_equal_and_so_is_the_result(name):
    x, wanted = CASES[name].make(), CASES[name].make()
    y = torchshm.share(x, consume=True)
    assert CASES[name].equal(y, wanted)
    assert CASES[name].equal(x, wanted)


def test_argument_refers_to_the_shared_memory():
    x = nested()
    y = torchshm.share(x, consume=True)
    places = [[a.ctypes.data for a in nested_memory(each)] for each in (x, y)]
    assert places[0] == places[1]
    assert nested_equal(x, y)


def test_array_held_twice_stays_one():
    a = rng().random(N)
    x = {"a": a, "b": [a], "c": Slotted(a, "n")}
    del a
    torchshm.share(x, consume=True)
    assert x["a"] is x["b"][0] is x["c"].data
    assert torchshm.is_shared(x["a"])


def test_arrays_that_overlap_are_not_torn_apart():
    whole = rng().random(2 * N)
    x = {"whole": whole, "part": whole[N:], "alone": rng().random(N)}
    y = torchshm.share(x, consume=True)
    assert torchshm.is_shared(x["alone"])
    x["whole"][N] = -1
    assert x["part"][0] == -1
    assert y["part"][0] != -1


class Locked(list):
    """Can't be changed any more."""

    def __init__(self, held, error):
        super().__init__(held)
        self.error = error

    def __setitem__(self, i, value):
        raise self.error("locked")

    def __reduce__(self):
        return Locked, (list(self), self.error)


def _same(x):
    return x["a"] is x["b"][0] is x["c"][-1]


@pytest.mark.parametrize(
    "hold",
    [
        lambda a: ("n", {"k": 1}, a),
        lambda a: ({"k": 1}, ([a, {}], a)),
        lambda a: Locked([a], TypeError),
        lambda a: Locked([a], RuntimeError),
    ],
    ids=["tuple", "tuple in a tuple", "read-only", "read-only, by another error"],
)
def test_array_is_replaced_for_all_that_hold_it_or_for_none(hold):
    def make():
        a = rng().random(N)
        held = hold(a)
        last = held if held[-1] is a else held[-1]
        return {"a": a, "b": [a], "c": last, "held": held}

    x = make()
    assert _same(torchshm.share(x))
    y = torchshm.share(x, consume=True)
    assert _same(y) and _same(x)
    assert torchshm.is_shared(y["a"]) and not torchshm.is_shared(x["a"])


def test_arrays_that_overlap_what_a_tuple_holds_are_not_torn_off():
    whole = rng().random(2 * N)
    x = {"tuple": (whole, {"k": 1}), "part": whole[N:], "alone": rng().random(N)}
    del whole
    torchshm.share(x, consume=True)
    assert torchshm.is_shared(x["alone"])
    x["part"][0] = -1
    assert x["tuple"][0][N] == -1


def test_tensors_in_tuples_are_replaced_where_they_are():
    a = torch.ones(N)
    x = {"a": a, "tuple": (a, {"k": 1})}
    y = torchshm.share(x, consume=True)
    assert x["tuple"][0] is x["a"] is a and torchshm.is_shared(a)
    assert y["tuple"][0] is y["a"]


def test_polars_columns_that_are_one_memory_keep_their_names():
    pl = pytest.importorskip("polars")
    one = pl.Series("a", rng().random(500))
    x = pl.DataFrame(
        [one, one.alias("b"), *(pl.Series(f"c{i}", np.full(500, float(i))) for i in range(2000))]
    )
    wanted = x.clone()
    y = torchshm.share(x, consume=True)
    assert x.equals(wanted) and y.equals(wanted) and x.columns == wanted.columns


def test_what_a_tuple_holds_beside_arrays_stays_the_same_object():
    inner = [rng().random(N)]
    x = {"inner": inner, "tuple": (inner, rng().random(N))}
    torchshm.share(x, consume=True)
    assert x["tuple"][0] is x["inner"] is inner
    assert torchshm.is_shared(inner[0])


def test_parameters_stay_the_optimiser_s():
    model = torch.nn.Linear(300, 300)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.weight
    torchshm.share(model, consume=True)
    assert model.weight is weight
    assert torchshm.is_shared(model.weight.detach())
    before = model.weight.detach().clone()
    model(torch.ones(300)).sum().backward()
    optimiser.step()
    assert not torch.equal(model.weight, before)


def test_memory_that_others_hold_stays_theirs():
    a = rng().random(N)
    wanted = a.copy()
    x = [a]
    torchshm.share(x, consume=True)
    assert x[0] is not a
    x[0][0] = -1
    np.testing.assert_array_equal(a, wanted)


def test_with_a_report():
    x = {
        "frame": mixed_frame(),
        "data": dataset(),
        "sample": Sample({"a": rng().random(N)}, "n"),
        "t": pa.table({"a": rng().random(N)}),
    }
    y, report = torchshm.share(x, consume=True, report=True)
    assert {leaf.outcome for leaf in report} == {"moved"}
    assert torchshm.is_shared(x["sample"].fields["a"]) and torchshm.is_shared(y["data"]["count"].values)


class Refusing(dict):
    def __getitem__(self, key):
        raise RuntimeError("not now")


def test_what_can_not_be_looked_into_is_shared_all_the_same():
    x = {"refusing": Refusing(a=rng().random(N)), "b": rng().random(N)}
    y, report = torchshm.share(x, consume=True, report=True)
    assert [leaf.path for leaf in report] == ["['b']"]
    assert torchshm.is_shared(x["b"])
    assert all(map(torchshm.is_shared, y["refusing"].values()))


def test_full_pool_leaves_the_argument_whole(tmp_path):
    passes(
        """
        import numpy as np, torchshm
        torchshm.register(limit="8MiB")
        x = {i: np.full(1 << 18, float(i)) for i in range(8)}
        try:
            torchshm.share(x, consume=True)
        except torchshm.PoolFullError:
            pass
        else:
            raise AssertionError
        assert all((x[i] == i).all() for i in range(8))
        assert 0 < sum(map(torchshm.is_shared, x.values())) < 8
        """,
        tmp_path,
    )


def test_frame_can_be_used_after_it_was_consumed():
    x = pd.DataFrame({"a": rng().random(N), "b": np.arange(N)})
    view = x[["a"]]
    wanted = x.copy()
    torchshm.share(x, consume=True)
    x.loc[0, "a"] = -1
    x["c"] = x["a"] + x["b"]
    pd.testing.assert_frame_equal(view, wanted[["a"]])
    assert x.loc[0, "c"] == -1
    gc.collect()
