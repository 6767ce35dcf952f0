"""What lies behind a name: a typed tree of arrays, tensors and plain values as JSON, over byte ranges of the store's pool.

Never a pickle, unless the value holds something that only pickle knows; that is marked, and loaded only where the caller allows it.
Whatever is read is checked: a damaged or forged text is an error, and no view leaves its block.

Text of a value::

    A <wire>                      one plain array; csrc/python/store_binding.cc writes and reads it
    J <json>                      {"regions": [[block, offset, bytes]], "leaves": [...], "value": node}
    P <8 bytes: length> <json> <pickle>      the same, its persistent ids and out-of-band buffers are leaves; so is a large pickle
"""

from __future__ import annotations

import base64
import copyreg
import functools
import importlib
import io
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from torchshm import _C, _arrow, _reducers
from torchshm._size import format_size
from torchshm.errors import PoolFullError, StaleHandleError, TorchshmError

MODES = {"r+": 0, "r": 1, "c": 2}
KEEP = 0  # the policy; csrc/store/layout.h
_PACKED_BELOW = 1 << 16  # bytes; smaller pieces of one value share a block. Arbitrary
_LINE = 64
_CARRIED = 1024  # bytes objects up to this many bytes lie in the text. Arbitrary
_PICKLE_BELOW = 1 << 20  # bytes; a text is copied twice when it is loaded, and has 64 MiB at most. Arbitrary
_LONE_BELOW = 512  # bytes of text
_TREE_BELOW = 1 << 18  # bytes of text; a tree takes ten times that
_FACES: dict[str, type] = {"matrix": np.matrix, "recarray": np.recarray}
_ARRAYS = {np.ndarray: None, np.memmap: None, np.matrix: "matrix", np.recarray: "recarray"}


def kind_of(text: bytes) -> str:
    """Name what a text describes, for people."""
    return {b"A": "array", b"J": "values", b"P": "object"}.get(text[:1], "unknown")


_to_json = json.JSONEncoder(separators=(",", ":")).encode


class _NotPlainError(Exception):
    """Only pickle knows how."""


class TooLargeError(PoolFullError):
    """A value for which no store of this limit has room, whatever goes."""


def _check_size(core: _C.Store, nbytes: int) -> None:
    if nbytes > (limit := core.limit):
        raise TooLargeError(
            f"this value needs {format_size(nbytes)}, and the store's limit is {format_size(limit)}: save it in parts, under several "
            "names, or start the store with a larger limit="
        )


# ---- dtypes


def dtype_to_node(dtype: np.dtype[Any]) -> Any:
    """JSON of a dtype without objects; TypeError for others, and for those that NumPy does not know by itself."""
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype} holds Python objects, which can't lie in shared memory")
    if dtype.subdtype is not None:
        return {"base": dtype_to_node(dtype.subdtype[0]), "shape": list(dtype.subdtype[1])}
    if dtype.fields is not None:
        names = list(dtype.names or ())
        fields = [dtype.fields[name] for name in names]
        return {
            "names": names,
            "formats": [dtype_to_node(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
            "align": dtype.isalignedstruct,
            "record": dtype.type is np.record,
        }
    if np.dtype(dtype.str) == dtype:
        return dtype.str
    if dtype.type.__module__ == "ml_dtypes":
        return {"ml": dtype.name}
    raise TypeError(f"dtype {dtype} is not one of NumPy's")


def node_to_dtype(node: Any) -> np.dtype[Any]:
    """The dtype that dtype_to_node() described."""
    if isinstance(node, str):
        made = np.dtype(node)
    elif "ml" in node:
        import ml_dtypes  # the program that saved it had it too

        name = str(node["ml"])
        if not name.isidentifier():
            raise ValueError(f"no dtype: {name!r}")
        made = np.dtype(getattr(ml_dtypes, name))
    elif "base" in node:
        made = np.dtype((node_to_dtype(node["base"]), tuple(node["shape"])))
    else:
        made = np.dtype(
            {
                "names": node["names"],
                "formats": [node_to_dtype(each) for each in node["formats"]],
                "offsets": node["offsets"],
                "titles": node["titles"],
                "itemsize": node["itemsize"],
            },
            align=bool(node["align"]),
        )
        if node["record"]:
            made = np.dtype((np.record, made))
    if made.hasobject:
        raise ValueError("a dtype with Python objects")
    return made


# ---- saving


class _Piece:
    """Memory that a leaf looks at: [low, high), and a compact copy of the leaf for where that is much more than it needs."""

    __slots__ = ("compact", "gaps", "group", "high", "leaf", "low")

    def __init__(
        self,
        leaf: dict[str, Any],
        low: int,
        high: int,
        gaps: bool,
        compact: Callable[[], Any] | None,
        group: int,
    ) -> None:
        self.leaf, self.low, self.high, self.gaps, self.compact, self.group = (
            leaf,
            low,
            high,
            gaps,
            compact,
            group,
        )


def _reach(start: int, shape: Any, steps: Any, itemsize: int) -> tuple[int, int]:
    """The lowest address, and the one past the highest, of an array with steps in bytes and no empty dimension."""
    spans = [(n - 1) * step for n, step in zip(shape, steps, strict=True)]
    return start + sum(s for s in spans if s < 0), start + sum(s for s in spans if s > 0) + itemsize


class _Writer:
    def __init__(self, core: _C.Store) -> None:
        self.core = core
        self.leaves: list[dict[str, Any]] = []
        self.regions: list[list[int]] = []
        self.refs: list[Any] = []
        self._known: dict[int, int] = {}
        self._alive: list[Any] = []  # whose addresses and ids are noted
        self._pieces: list[_Piece] = []
        self._within: set[int] = set()

    # -- the tree

    def node(self, x: Any) -> Any:
        kind = type(x)
        if x is None or kind in (bool, float, str):
            return x
        if kind is int:
            return x if x.bit_length() < 1000 else {"i": hex(x)}  # Python writes only so many decimal digits
        if kind is complex:
            return {"c": [x.real, x.imag]}
        if kind is bytes and len(x) <= _CARRIED:
            return {"b": base64.b64encode(x).decode("ascii")}
        if kind in (list, tuple, dict, OrderedDict):
            if id(x) in self._within:
                raise _NotPlainError  # it holds itself
            self._within.add(id(x))
            try:
                return self._container(x, kind)
            finally:
                self._within.discard(id(x))
        index = self.leaf(x)
        if index is None:
            raise _NotPlainError
        return {"x": index}

    def _container(self, x: Any, kind: type) -> Any:
        if kind is list:
            return [self.node(each) for each in x]
        if kind is tuple:
            return {"t": [self.node(each) for each in x]}
        pairs = [[self.node(key), self.node(value)] for key, value in x.items()]
        if kind is dict:
            return {"d": pairs}
        if set(vars(x)) - {"_metadata"}:
            raise _NotPlainError
        return {"o": pairs, "m": self.node(vars(x).get("_metadata"))}  # a state_dict has that

    # -- leaves

    def leaf(self, x: Any) -> int | None:
        """The index of what is stored as bytes; None for what is not."""
        if id(x) in self._known:
            return self._known[id(x)]
        leaf = self._leaf_of(x)
        if leaf is None:
            return None
        self.leaves.append(leaf)
        self._alive.append(x)
        self._known[id(x)] = len(self.leaves) - 1
        return len(self.leaves) - 1

    def _leaf_of(self, x: Any) -> dict[str, Any] | None:
        kind = type(x)
        if kind in _ARRAYS:
            return self._array(x, _ARRAYS[kind])
        if isinstance(x, np.generic):
            return self._array(np.asarray(x), "scalar")
        if kind in (bytes, bytearray):
            return self._array(np.asarray(memoryview(x)), kind.__name__)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(x, torch.Tensor):
            return self._tensor(torch, x) if kind in (torch.Tensor, torch.nn.Parameter) else None
        if isinstance(x, np.ndarray):
            return None
        try:
            return self._array(np.asarray(memoryview(x)), "memoryview")
        except TypeError:
            pass
        if hasattr(kind, "__dlpack__"):
            try:
                return self._array(np.from_dlpack(x), None)
            except TypeError:
                pass  # Arrow's arrays of strings, or with nulls
        return None

    def _array(self, x: Any, face: str | None) -> dict[str, Any] | None:
        try:
            dtype = dtype_to_node(x.dtype)
        except TypeError:
            return None
        plain = np.ndarray.view(x, np.ndarray) if type(x) is not np.ndarray else x
        leaf = {
            "k": "array",
            "dtype": dtype,
            "shape": list(plain.shape),
            "strides": list(plain.strides),
            "r": None,
        }
        if face is not None:
            leaf["as"] = face
        if plain.nbytes > 0:

            def compact() -> Any:
                copy = plain.copy(order="K")
                leaf["strides"] = list(copy.strides)
                return copy.__array_interface__["data"][0], copy.nbytes, copy

            start = plain.__array_interface__["data"][0]
            low, high = _reach(start, plain.shape, plain.strides, plain.itemsize)
            leaf["at"] = start
            self._alive.append(plain)
            self._pieces.append(_Piece(leaf, low, high, high - low > plain.nbytes, compact, 0))
        return leaf

    def _tensor(self, torch: Any, x: Any) -> dict[str, Any]:
        if x.device.type != "cpu":
            raise TypeError(f"a tensor on {x.device} can't lie in a store: save value.cpu()")
        sparse = {
            torch.sparse_coo: ("_indices", "_values"),
            torch.sparse_csr: ("crow_indices", "col_indices", "values"),
            torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
            torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
            torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
        }
        kept = {"grad": x.requires_grad, "param": type(x) is torch.nn.Parameter}
        if x.layout in sparse:
            bare = x.detach()
            parts = [self.leaf(getattr(bare, part)()) for part in sparse[x.layout]]
            coalesced = x.layout is not torch.sparse_coo or x.is_coalesced()
            return {
                "k": "sparse",
                "layout": str(x.layout).removeprefix("torch."),
                "size": list(x.shape),
                "parts": parts,
                "coalesced": coalesced,
                **kept,
            }
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"a tensor of layout {x.layout} can't lie in a store: save value.to_dense()")
        bare = x.detach().resolve_conj().resolve_neg()
        leaf = {
            "k": "tensor",
            "dtype": str(bare.dtype).removeprefix("torch."),
            "size": list(bare.shape),
            "stride": list(bare.stride()),
            "r": None,
            **kept,
        }
        if bare.is_quantized:
            leaf["q"] = self._quantizer(torch, bare)
        if bare.numel() > 0:
            size = bare.element_size()

            def compact() -> Any:
                copy = bare.clone()
                leaf["stride"] = list(copy.stride())
                return copy.data_ptr(), copy.numel() * size, copy

            low, high = _reach(bare.data_ptr(), bare.shape, [s * size for s in bare.stride()], size)
            leaf["at"] = bare.data_ptr()
            self._alive.append(bare)
            group = bare.untyped_storage().data_ptr()
            self._pieces.append(_Piece(leaf, low, high, high - low > bare.numel() * size, compact, group))
        return leaf

    def _quantizer(self, torch: Any, x: Any) -> dict[str, Any]:
        if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return {"scale": x.q_scale(), "zero": x.q_zero_point()}
        if x.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            scales, zeros = self.leaf(x.q_per_channel_scales()), self.leaf(x.q_per_channel_zero_points())
            return {"scales": scales, "zeros": zeros, "axis": x.q_per_channel_axis()}
        raise TypeError(f"a tensor quantised as {x.qscheme()} can't lie in a store: save value.dequantize()")

    # -- the bytes

    def place(self) -> None:
        """Give every piece a region: where it lies already, or one copy; what overlaps, and tensors of one storage, share it."""
        fresh: list[tuple[int, int, list[_Piece]]] = []  # address and length of what is copied
        for low, high, pieces in _merge(self._pieces):
            found = self.core.refer(low, high - low)
            if found is not None:
                ref, block, offset = found
                self._region(self._block(block, ref), offset, high - low, low, pieces)
            elif len(pieces) == 1 and pieces[0].gaps and pieces[0].compact is not None:
                address, length, copy = pieces[0].compact()
                self._alive.append(copy)
                pieces[0].leaf["at"] = address
                fresh.append((address, length, pieces))
            else:
                fresh.append((low, high - low, pieces))
        small = [each for each in fresh if each[1] < _PACKED_BELOW]
        total = sum(length for _, length, _ in fresh)
        _check_size(self.core, total)  # before others have to go for a part of it
        self._copy(small, total)
        for each in fresh:
            if each[1] >= _PACKED_BELOW:
                self._copy([each], total)

    def _copy(self, what: list[tuple[int, int, list[_Piece]]], total: int) -> None:
        if not what:
            return
        places, end = [], 0
        for address, length, _ in what:
            end += -end % _LINE + address % _LINE  # as aligned as it was
            places.append(end)
            end += length
        target = self.core.blank(end)
        self.refs.append(target.base)
        for (address, length, pieces), offset in zip(what, places, strict=True):
            _C.copy_into(target, offset, address, length, total)
            self._region(len(self.refs) - 1, offset, length, address, pieces)

    def _block(self, block: int, ref: Any) -> int:
        key = -1 - block  # beside the ids of objects
        if key not in self._known:
            self.refs.append(ref)
            self._known[key] = len(self.refs) - 1
        return self._known[key]

    def _region(self, block: int, offset: int, length: int, low: int, pieces: list[_Piece]) -> None:
        for piece in pieces:
            piece.leaf["r"] = len(self.regions)
            piece.leaf["o"] = piece.leaf.pop("at") - low
        self.regions.append([block, offset, length])

    def json(self, value: Any) -> bytes:
        whole = {"regions": self.regions, "leaves": self.leaves, "value": value}
        return _to_json(whole).encode("ascii")


def _merge(pieces: list[_Piece]) -> list[tuple[int, int, list[_Piece]]]:
    groups: dict[Any, tuple[int, int, list[_Piece]]] = {}
    for i, piece in enumerate(pieces):
        name = ("storage", piece.group) if piece.group else i
        low, high, members = groups.get(name, (piece.low, piece.high, []))
        groups[name] = (min(low, piece.low), max(high, piece.high), [*members, piece])
    merged: list[tuple[int, int, list[_Piece]]] = []
    for low, high, members in sorted(groups.values(), key=lambda group: group[0]):
        if merged and low < merged[-1][1]:
            before = merged[-1]
            merged[-1] = (before[0], max(before[1], high), before[2] + members)
        else:
            merged.append((low, high, members))
    return merged


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, writer: _Writer, buffers: list[int], reducers: dict[type, Any]) -> None:
        super().__init__(file, 5, buffer_callback=functools.partial(_out_of_band, writer, buffers))
        masked = _reducers.masked_type()
        ours = {} if masked is None else {masked: _reducers._reduce_masked}
        self.dispatch_table = copyreg.dispatch_table | ours | reducers
        self._writer = writer

    def persistent_id(self, x: Any) -> int | None:
        kind = type(x)
        torch = sys.modules.get("torch")
        if kind in _ARRAYS or (torch is not None and kind in (torch.Tensor, torch.nn.Parameter)):
            return self._writer.leaf(x)
        return None


def _out_of_band(writer: _Writer, buffers: list[int], buffer: pickle.PickleBuffer) -> bool:
    # No method of the pickler: it would keep itself, and with it the blocks, until the garbage collector comes.
    index = writer.leaf(buffer.raw())
    if index is not None:
        buffers.append(index)
    return index is None


def _plain(torch: Any, x: Any) -> bool:
    """Whether a tensor is nothing but its bytes in C order."""
    return (
        x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and not (x.requires_grad or x.is_quantized or x.is_conj() or x.is_neg() or x.is_nested)
        and x.numel() > 0
    )


def _describe_lone(core: _C.Store, x: Any) -> tuple[bytes, list[Any]]:
    """As _Writer does it, in a third of the time."""
    address, length = x.data_ptr(), x.nbytes
    ref: Any
    found = core.refer(address, length)
    if found is not None:
        ref, _, start = found
    else:
        start = address % _LINE
        target = core.blank(start + length)
        _C.copy_into(target, start, address, length)
        ref = target.base
    dtype = str(x.dtype).removeprefix("torch.")
    text = (
        f'J{{"regions":[[0,{start},{length}]],"leaves":[{{"k":"tensor","dtype":"{dtype}","size":{list(x.shape)},'
        f'"stride":{list(x.stride())},"r":0,"grad":false,"param":false,"o":0}}],"value":{{"x":0}}}}'
    )
    return text.encode("ascii"), [ref]


def describe(core: _C.Store, value: Any) -> tuple[bytes, list[Any]]:
    """The text of a value, and references to the blocks that it speaks of, its bytes in them."""
    torch = sys.modules.get("torch")
    if torch is not None and type(value) is torch.Tensor and _plain(torch, value):
        return _describe_lone(core, value)
    writer = _Writer(core)
    try:
        node = writer.node(value)
    except (_NotPlainError, RecursionError):
        writer = _Writer(core)
        skeleton, buffers = io.BytesIO(), []  # type: ignore[var-annotated]
        with _arrow.saving(core) as reducers:
            _Pickler(skeleton, writer, buffers, reducers).dump(value)
        pickled = skeleton.getbuffer()
        if len(pickled) < _PICKLE_BELOW:
            writer.place()
            tree = writer.json(buffers)
            return b"P" + len(tree).to_bytes(8, "little") + tree + pickled, writer.refs
        apart = writer.leaf(pickled)
        writer.place()
        tree = writer.json({"buffers": buffers, "pickle": apart})
        return b"P" + len(tree).to_bytes(8, "little") + tree, writer.refs
    writer.place()
    return b"J" + writer.json(node), writer.refs


# ---- loading


class _Reader:
    def __init__(
        self,
        core: _C.Store | _C.StoreFile,
        tree: Any,
        blocks: list[tuple[int, int]],
        arrays: str,
        tensors: str,
    ) -> None:
        self.core, self.blocks = core, blocks
        self.regions, self.leaves = tree["regions"], tree["leaves"]
        self.arrays, self.tensors = arrays, tensors
        self._opened: dict[tuple[int, str], Any] = {}
        self._backing: dict[int, Any] = {}  # tensors whose storage is the whole region
        self._built: dict[int, Any] = {}
        self._dtypes: dict[Any, tuple[Any, ...]] = {}

    def node(self, n: Any) -> Any:
        kind = type(n)
        if kind is not dict and kind is not list:
            return n
        if kind is list:
            return [self.node(each) for each in n]
        if "x" in n:
            index = n["x"]
            built = self._built.get(index) if type(index) is int else None
            return self.leaf(index) if built is None else built
        if "d" in n:
            node = self.node
            return {key if type(key) is str else node(key): node(value) for key, value in n["d"]}
        if "t" in n:
            return tuple(self.node(each) for each in n["t"])
        if "b" in n:
            return base64.b64decode(n["b"], validate=True)
        if "i" in n:
            return int(n["i"], 16)
        if "c" in n:
            return complex(*n["c"])
        made = OrderedDict((self.node(key), self.node(value)) for key, value in n["o"])
        if n["m"] is not None:
            made._metadata = self.node(n["m"])  # type: ignore[attr-defined]
        return made

    def leaf(self, index: Any) -> Any:
        index = _count(index)
        if index not in self._built:
            leaf = self.leaves[index]
            self._built[index] = None  # one that is its own part fails
            self._built[index] = _KINDS[leaf["k"]](self, leaf)
        return self._built[index]

    def region(self, index: Any, mode: str) -> Any:
        """The bytes of a region."""
        block, offset, length = _counts(self.regions[_count(index)])
        key = (block, mode)
        if key not in self._opened:
            self._opened[key] = self.core.open(*self.blocks[block], MODES[mode])
        whole = self._opened[key]
        if offset + length > whole.size:
            raise ValueError("a region is larger than its block")
        return whole[offset : offset + length]

    def _array(self, leaf: dict[str, Any]) -> Any:
        dtype, shape = node_to_dtype(leaf["dtype"]), tuple(map(_count, leaf["shape"]))
        face = leaf.get("as")
        if leaf["r"] is None:
            made = np.empty(shape, dtype)
        else:
            strides = tuple(map(int, leaf["strides"]))
            region = self.region(leaf["r"], self.arrays)
            made = np.ndarray(shape, dtype, region, _count(leaf["o"]), strides)
        if made.size > 0 and leaf["r"] is None and dtype.itemsize > 0:
            raise ValueError("an array without memory")
        if face is None:
            return made
        if face in _FACES:
            return made.view(_FACES[face])
        if face == "scalar":
            return made[()]
        return {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[face](made)

    def _kept(self, torch: Any, leaf: dict[str, Any], made: Any) -> Any:
        if leaf["param"]:
            return torch.nn.Parameter(made, requires_grad=bool(leaf["grad"]))
        return made.requires_grad_() if leaf["grad"] else made

    def _all_of_region(self, leaf: dict[str, Any], dtype: Any, item: int) -> Any:
        """The array of a contiguous tensor that is all of its region, the usual one; None of another, also where something is wrong."""
        index, items = leaf["r"], 1
        for n, step in zip(reversed(leaf["size"]), reversed(leaf["stride"]), strict=True):
            if type(n) is not int or n <= 0 or step != items:
                return None
            items *= n
        if type(index) is not int or index < 0 or leaf["o"] != 0 or index in self._backing:
            return None
        block, offset, length = self.regions[index]
        whole = self._opened.get((block, self.tensors))
        if (
            whole is None
            or type(offset) is not int
            or not 0 <= offset <= whole.size - length
            or length != items * item
        ):
            return None
        return np.ndarray(leaf["size"], dtype, whole, offset)

    def _tensor(self, leaf: dict[str, Any]) -> Any:
        torch = sys.modules.get("torch") or importlib.import_module("torch")
        dtype, numpy_dtype, item = self._dtypes.get(leaf["dtype"]) or self._dtype(torch, leaf["dtype"])
        if numpy_dtype is not None and (shaped := self._all_of_region(leaf, numpy_dtype, item)) is not None:
            self._backing[leaf["r"]] = made = torch.from_numpy(shaped)
            return self._kept(torch, leaf, made) if leaf["param"] or leaf["grad"] else made
        size, stride = _counts(leaf["size"]), _counts(leaf["stride"])
        if len(size) != len(stride):
            raise ValueError("sizes and strides of a tensor differ in number")
        if leaf["r"] is None:
            if 0 not in size:
                raise ValueError("a tensor without memory")
            return self._kept(torch, leaf, self._empty(torch, leaf, dtype, size))
        offset = _count(leaf["o"])
        region = self.region(leaf["r"], self.tensors)
        end = offset + item
        for n, s in zip(size, stride, strict=True):
            end += (n - 1) * s * item
        if 0 in size or end > region.size:
            raise ValueError("a tensor is larger than its region")
        key = leaf["r"] if offset % item == 0 else None
        backing = self._backing.get(key) if key is not None else None
        if backing is None and offset == 0 and end == region.size and numpy_dtype is not None:
            # The usual one, a tensor that is all of its region: set_() takes three times as long.
            shaped = np.ndarray(size, numpy_dtype, region, 0, [s * item for s in stride])
            self._backing[leaf["r"]] = made = torch.from_numpy(shaped)
            return self._kept(torch, leaf, made)
        if key is None:
            region, offset = region[offset:], 0
        if backing is None:
            backing = torch.from_numpy(region)
            if key is not None:
                self._backing[key] = backing
        made = self._empty(torch, leaf, dtype, size)
        made.set_(backing.untyped_storage(), offset // item, size, stride)
        return self._kept(torch, leaf, made)

    def _dtype(self, torch: Any, name: Any) -> tuple[Any, ...]:
        """torch's dtype, NumPy's where it has that one too, and bytes per item."""
        dtype = _named(torch, name, torch.dtype)
        self._dtypes[name] = found = dtype, _numpy_dtypes(torch).get(dtype), dtype.itemsize
        return found

    def _empty(self, torch: Any, leaf: dict[str, Any], dtype: Any, size: list[int]) -> Any:
        q = leaf.get("q")
        if q is None:
            return torch.empty(size if leaf["r"] is None else 0, dtype=dtype)
        if "scale" in q:
            return torch._empty_affine_quantized(
                size, scale=float(q["scale"]), zero_point=int(q["zero"]), dtype=dtype
            )
        scales, zeros = self.leaf(q["scales"]), self.leaf(q["zeros"])
        axis = _count(q["axis"])
        if not scales.shape == zeros.shape == (size[axis],):
            raise ValueError("scales of a quantised tensor do not fit it")
        return torch._empty_per_channel_affine_quantized(
            size, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
        )

    def _sparse(self, leaf: dict[str, Any]) -> Any:
        import torch

        parts = [self.leaf(part) for part in leaf["parts"]]
        size = tuple(map(_count, leaf["size"]))
        # Indices that lead out of the tensor would be followed by every operation.
        if leaf["layout"] == "sparse_coo":
            made = torch.sparse_coo_tensor(
                *parts, size, is_coalesced=bool(leaf["coalesced"]), check_invariants=True
            )
        else:
            layout = _named(torch, leaf["layout"], torch.layout)
            made = torch.sparse_compressed_tensor(*parts, size, layout=layout, check_invariants=True)
        return self._kept(torch, leaf, made)


_KINDS: dict[str, Callable[[_Reader, dict[str, Any]], Any]] = {
    "array": _Reader._array,
    "tensor": _Reader._tensor,
    "sparse": _Reader._sparse,
}


@functools.cache
def _numpy_dtypes(torch: Any) -> dict[Any, np.dtype[Any]]:
    """Those of torch's plain dtypes that NumPy has too."""
    names = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    return {getattr(torch, name): np.dtype(name) for name in (*names, "complex64", "complex128")}


def _tree(text: bytes) -> Any:
    return _known_tree(text) if len(text) < _TREE_BELOW else json.loads(text)


@functools.lru_cache(maxsize=16)
def _known_tree(text: bytes) -> Any:
    """For values of one make that come again and again, such as a module's new weights: blocks are not in the text."""
    return json.loads(text)


@functools.lru_cache(maxsize=256)
def _lone_tensor(text: bytes) -> tuple[Any, ...] | None:
    """Of the text of one plain tensor that is all of its region: offset and length in the block, dtype, shape and strides in bytes.

    Such a text does not say where the block is, so a program that loads many tensors of a shape reads few of them. None: let _Reader do
    it, or say what is wrong.
    """
    try:
        tree = json.loads(text[1:])
        ((block, start, length),) = tree["regions"]
        (leaf,) = tree["leaves"]
        if (tree["value"], leaf["k"], leaf["r"], leaf["o"], block) != ({"x": 0}, "tensor", 0, 0, 0):
            return None
        import torch

        dtype = _numpy_dtypes(torch).get(_named(torch, leaf["dtype"], torch.dtype))
        size, stride = _counts(leaf["size"]), _counts(leaf["stride"])
        if dtype is None or "q" in leaf or leaf["grad"] or leaf["param"] or 0 in size:
            return None
        steps = [step * dtype.itemsize for step in stride]
        last = sum((n - 1) * step for n, step in zip(size, steps, strict=True))
        if last + dtype.itemsize != _count(length):
            return None
        return _count(start), length, dtype, size, steps
    except (ValueError, TypeError, KeyError):
        return None


def _open_lone(
    core: _C.Store | _C.StoreFile, block: tuple[int, int], plan: tuple[Any, ...], mode: str
) -> Any:
    import torch

    start, length, dtype, size, steps = plan
    whole = core.open(*block, MODES[mode])
    if start + length > whole.size:
        raise ValueError("a region is larger than its block")
    return torch.from_numpy(np.ndarray(size, dtype, whole[start : start + length], 0, steps))


def _count(n: Any) -> int:
    if type(n) is not int or n < 0:
        raise ValueError(f"not a count: {n!r}")
    return n


def _counts(ns: Any) -> list[int]:
    if type(ns) is not list:
        raise ValueError(f"not counts: {ns!r}")
    for n in ns:
        if type(n) is not int or n < 0:
            raise ValueError(f"not a count: {n!r}")
    return ns


def _named(torch: Any, name: Any, kind: type) -> Any:
    found = getattr(torch, name) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, kind):
        raise ValueError(f"torch has no {kind.__name__} {name!r}")
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, reader: _Reader, buffers: list[int]) -> None:
        super().__init__(file, buffers=[reader.leaf(index) for index in buffers])
        self._reader = reader

    def persistent_load(self, pid: Any) -> Any:
        return self._reader.leaf(pid)


def rebuild(
    core: _C.Store | _C.StoreFile,
    key: str,
    text: bytes,
    blocks: list[tuple[int, int]],
    mode: str | None,
    allow_pickle: bool,
) -> Any:
    """The value of a name, its bytes where they are.

    Raises
    ------
    StaleHandleError
        When a block has gone meanwhile: the name has been removed or replaced.
    """
    pickled = text[:1] == b"P"
    if pickled and not allow_pickle:
        raise ValueError(
            f"{key!r} holds an object that only pickle can rebuild, and unpickling runs whatever the saver chose: if you trust "
            "every process that can save into this store, load it with allow_pickle=True"
        )
    tensors = "c" if mode in (None, "r") else str(mode)  # torch has no read-only tensors
    try:
        if pickled:
            end = 9 + int.from_bytes(text[1:9], "little")
            tree, skeleton = _tree(text[9:end]), text[end:]
        elif text[:1] == b"J":
            plan = _lone_tensor(text) if len(text) < _LONE_BELOW and len(blocks) == 1 else None
            if plan is not None:
                return _open_lone(core, blocks[0], plan, tensors)
            tree = _tree(text[1:])
        else:
            raise ValueError("made by another version of torchshm")
        reader = _Reader(core, tree, blocks, mode or ("c" if pickled else "r"), tensors)
        if not pickled:
            return reader.node(tree["value"])
        buffers = tree["value"]
        if type(buffers) is dict:
            buffers, skeleton = buffers["buffers"], reader.leaf(buffers["pickle"])
        unpickler = _Unpickler(io.BytesIO(skeleton), reader, buffers)
    except (TorchshmError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise TorchshmError(f"the entry of {key!r} is damaged: {error}") from error
    return unpickler.load()


__all__ = ["MODES", "StaleHandleError", "describe", "rebuild"]
