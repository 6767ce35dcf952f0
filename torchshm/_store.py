"""The store: names for data in shared memory, for processes that need not know one another."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.util
import os
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from torchshm import _C, _prefetch, _room, _tensors, _values
from torchshm._arguments import POLICIES, patience_of, policy_of, ttl_of
from torchshm._joining import join
from torchshm._locks import Lock
from torchshm._mapping import LiveMapping
from torchshm._size import FOREVER, parse_seconds
from torchshm.errors import (
    KeyExistsError,
    PoolFullError,
    StaleHandleError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    import torch

_LOOK = 1_000_000_000  # ns; a saver that dies after it has named the value rings no bell
_TURN = "\0room"  # the lock of those who wait for room for several parts
_STOPPED = 1.0  # s after which one who has the turn is not waited for
_FROM_MEMORY = 0.005  # s of loading several values after which it is asked whether all of them fit. Arbitrary
_ATTEMPTS = 100  # at a name that changes while it is being opened


_GONE = object()  # a name that was removed meanwhile


def _checked(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(
            f"a key is a str, not {type(key).__name__}; torchshm.key(...) makes one of other values"
        )
    if not key or key[0] == "\0":
        raise ValueError("a key has at least one character, and does not begin with a zero byte")
    return key


def _place(core: _C.Store, key: str, value: Any, ttl: int, overwrite: bool, policy: int) -> None:
    # In a frame of its own: what it holds is given up when it fails.
    text, refs = _values.describe(core, value)
    core.save(key, text, refs, overwrite, ttl, False, policy)


def _try_to_place(
    core: _C.Store, key: str, value: Any, ttl: int, overwrite: bool, policy: int
) -> PoolFullError | None:
    """Give the error when there is no room now, and raise it when there never will be."""
    try:
        _place(core, key, value, ttl, overwrite, policy)
    except _values.TooLargeError as error:
        raise PoolFullError(str(error)) from None
    except PoolFullError as error:
        if _room.never(error):
            raise
        return error
    return None


# At the end of the program whoever had a store last removes its files.
_cores: weakref.WeakSet[_C.Store] = weakref.WeakSet()


def _leave_all() -> None:
    for core in list(_cores):
        core.leave()


# When the children that multiprocessing ends have ended: they have the store too.
multiprocessing.util.Finalize(None, _leave_all, exitpriority=-100)


class Store(LiveMapping):
    """A client of a store, from :func:`torchshm.start` or :func:`torchshm.connect`.

    Saving, loading and removing work on shared memory and need no answer from the service: they go on while it is down. A Store may
    be used from any thread and after a fork, and it can be pickled: the copy connects by name when it is first used, so a Dataset
    that holds one works in DataLoader workers of every start method.

    As a mapping it saves with ``overwrite=True`` and loads in the default modes.
    """

    def __init__(self, name: str, timeout: float, core: _C.Store | None) -> None:
        self._name, self._timeout = name, timeout
        self._held = core
        if core is not None:
            _cores.add(core)
        self._closed = False
        self._end: Any = None
        if core is not None and core.serving:
            # Also at the end of the interpreter: the socket goes with the service.
            self._end = weakref.finalize(self, _C.Store.stop, core)

    @property
    def name(self) -> str:
        """The store's name."""
        return self._name

    @property
    def _core(self) -> _C.Store:
        core = self._held
        if core is None:
            if self._closed:
                raise StoreUnavailableError(
                    f"this client of the store {self._name} is closed; torchshm.connect({self._name!r}) makes another"
                )
            core = self._held = join(self._name, self._timeout)
            _cores.add(core)
        return core

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self._name, self._timeout, None)

    def __repr__(self) -> str:
        state = (
            "closed"
            if self._closed
            else "serving"
            if self._held is not None and self._held.serving
            else "client"
        )
        return f"<torchshm.Store {self._name!r}, {state}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    # ---- values

    def save(
        self,
        key: str,
        value: Any,
        ttl: float | None = None,
        overwrite: bool = False,
        *,
        policy: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Put a value into the store under a name. Others see all of it or nothing.

        What lies in the store's memory already is only named: made in :meth:`storage`, loaded from it, or, with
        ``register(store=...)``, received in a message. Everything else is copied once.

        Parameters
        ----------
        key : str
        value : object
            numpy.ndarray without objects, torch.Tensor on the CPU (strided, sparse, quantised), None, bool, int, float, complex, str,
            bytes, exporters of buffers and DLPack, and lists, tuples and dicts of those, nested; views keep sharing what they
            share. Anything else picklable is saved as a pickle whose arrays and buffers lie in the store; loading it needs
            ``allow_pickle=True``. Tensors are saved as ``torch.save`` does: values and ``requires_grad``, no graph.
        ttl : float, optional
            Seconds after which the name goes. Default: the store's. Who holds the data keeps it.
        overwrite : bool
            Replace what has that name. Who holds the old value keeps it.
        policy : {"keep", "drop", "spill", "pin"}, optional
            What may become of the value while nobody uses it, when the store needs room. In this order values go, least recently used
            first: ``"drop"`` is removed; ``"spill"`` and then ``"keep"`` go to the store's spill directory, where it has one, and come back
            when they are loaded; ``"pin"`` stays in memory. Default: the store's, which is ``"keep"`` unless said otherwise. What several
            names have stays in memory.
        timeout : float, optional
            Seconds to wait for room. Default: the store's.

        Raises
        ------
        KeyExistsError
            When the name is taken and `overwrite` is not set.
        PoolFullError
            When the store has no room, and none was made in time; at once for a value that needs more than the store's limit.
        TypeError
            For tensors that can't be shared: on another device, or of a layout without plain memory.
        """
        self._save(
            self._core, _checked(key), value, ttl_of(ttl), overwrite, policy_of(policy), patience_of(timeout)
        )

    def _save(
        self,
        core: _C.Store,
        key: str,
        value: Any,
        ttl: int,
        overwrite: bool,
        policy: int = -1,
        patience: int = -1,
    ) -> None:
        try:
            if type(value) is np.ndarray and core.save_array(
                key, value, overwrite, ttl, False, policy, patience
            ):
                return
            if not overwrite and core.contains(key):  # before the work
                raise KeyExistsError(
                    f"{key} is a name in this store already; save it under another one, or with overwrite=True"
                )
            wanting = _try_to_place(core, key, value, ttl, overwrite, policy)
            if wanting is None:
                return
            self._save_in_turn(core, key, value, ttl, overwrite, policy, patience, wanting)
        except PoolFullError as error:
            _room.explain(core, error)
            raise

    def _save_in_turn(
        self,
        core: _C.Store,
        key: str,
        value: Any,
        ttl: int,
        overwrite: bool,
        policy: int,
        patience: int,
        wanting: PoolFullError,
    ) -> None:
        """Save a value of several parts when there is room for all of them.

        Those who wait for room hold nothing, and place their parts one after another, or two of them could each have half of the room.
        """
        begun = tried = time.monotonic()
        deadline = begun + (core.patience if patience < 0 else patience * 1e-9)
        turn = core.lock(_TURN)
        try:
            for attempt in itertools.count():
                # What was placed so far is given up before the wait: others may need just that.
                traceback.clear_frames(wanting.__traceback__)
                if time.monotonic() >= deadline:
                    raise wanting
                core.wait_for_room(attempt)
                # Who has the turn may be stopped.
                mine = turn.held or turn.try_acquire(False)
                if not mine and time.monotonic() < tried + _STOPPED:
                    continue
                tried = time.monotonic()
                still = _try_to_place(core, key, value, ttl, overwrite, policy)
                if still is None:
                    return
                wanting = still
        finally:
            del wanting
            if turn.held:
                turn.release()

    def load(
        self,
        key: str | Iterable[str] | None = None,
        *,
        prefix: str | None = None,
        timeout: float = 0,
        mode: str | None = None,
        allow_pickle: bool = False,
    ) -> Any:
        """Return what a name stands for, without a copy.

        Parameters
        ----------
        key : str or iterable of str
            One name, or several for a list of values.
        prefix : str, optional
            In the place of `key`: a dict of all names that begin with it, and their values.
        timeout : float
            Seconds to wait for names that are not there yet; ``-1``: until they come.
        mode : {"r", "c", "r+"}, optional
            What writing does, as in :class:`numpy.memmap`. ``"r"``: an error; tensors, which can't be read-only, are ``"c"``.
            ``"c"``: it stays private to this process. ``"r+"``: it is seen by everybody. Default: arrays ``"r"``, tensors ``"c"``,
            what is in pickled objects ``"c"``.
        allow_pickle : bool
            Also load objects that need unpickling, which runs code that the saver chose.

        Raises
        ------
        KeyError
            When there is no such name, and `timeout` is 0.
        TimeoutError
            When the time is up.
        PoolFullError
            When a value is on disk and there is no room for it, and none was made in time; at once for several that together need
            more than the store's limit.
        ValueError
            For an object that needs ``allow_pickle=True``.
        """
        if timeout == 0 and type(key) is str and prefix is None and (mode is None or mode in _values.MODES):
            core = self._held or self._core
            try:
                raw = core.load(
                    key if key[:1] not in ("", "\0") else _checked(key), _values.MODES[mode or "r"]
                )
            except PoolFullError as error:
                _room.explain(core, error, key)
                raise
            if type(raw) is not tuple:
                return raw
            with contextlib.suppress(StaleHandleError):  # removed or replaced after it was found
                return _values.rebuild(core, key, raw[0], raw[1], mode, allow_pickle)
        if mode is not None and mode not in _values.MODES:
            raise ValueError(f"mode is 'r', 'c' or 'r+', not {mode!r}")
        if (key is None) == (prefix is None):
            raise TypeError("load() takes a key, several keys, or prefix=")
        timeout = parse_seconds(timeout, "timeout")
        deadline = None if timeout < 0 else time.monotonic() + timeout
        if prefix is not None:
            names = self._core.keys(prefix)
            values = self._load_several(names, 0, None, mode, allow_pickle, _GONE)
            return {name: value for name, value in zip(names, values, strict=True) if value is not _GONE}
        if isinstance(key, str):
            return self._load(key, timeout, deadline, mode, allow_pickle)
        assert key is not None
        return self._load_several(list(key), timeout, deadline, mode, allow_pickle)

    def _load_several(
        self,
        keys: list[str],
        timeout: float,
        deadline: float | None,
        mode: str | None,
        allow_pickle: bool,
        lacking: Any = None,
    ) -> list[Any]:
        """Values in the order of their names; `lacking`, if it is given, for those that are not there."""
        core, load, clock = self._core, self._load, time.monotonic
        # What takes longer comes from disk. A look at all of the names would take longer than loading what is in memory.
        look = clock() + _FROM_MEMORY if len(keys) > 1 and core.patience > 0 else None
        values: list[Any] = []
        try:
            for key in keys:
                try:
                    values.append(load(key, timeout, deadline, mode, allow_pickle))
                except KeyError as missing:
                    if lacking is None or missing.args != (key,):  # one that unpickling has raised
                        raise
                    values.append(lacking)
                if look is not None and clock() > look:
                    look = None
                    if error := _room.too_much(core, keys):
                        raise error
        except PoolFullError as error:
            values.clear()  # whoever keeps the error does not keep them
            raise _room.too_much(core, keys, surely=False) or error from None
        return values

    def _load(
        self, key: str, timeout: float, deadline: float | None, mode: str | None, allow_pickle: bool
    ) -> Any:
        core = self._core
        for attempt in range(_ATTEMPTS):
            try:
                raw = self._find(core, _checked(key), timeout, deadline, _values.MODES[mode or "r"])
            except PoolFullError as error:
                _room.explain(core, error, key)
                raise
            try:
                return self._open(core, key, raw, mode, allow_pickle)
            except StaleHandleError:
                # Removed or replaced after it was found.
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError

    def _open(self, core: _C.Store, key: str, raw: Any, mode: str | None, allow_pickle: bool) -> Any:
        if type(raw) is not tuple:
            return raw
        return _values.rebuild(core, key, raw[0], raw[1], mode, allow_pickle)

    def _find(self, core: _C.Store, key: str, timeout: float, deadline: float | None, mode: int) -> Any:
        if timeout == 0:
            return core.load(key, mode)
        while True:
            bell = core.bell(key)
            try:
                return core.load(key, mode)
            except KeyError:
                pass
            left = FOREVER if deadline is None else int((deadline - time.monotonic()) * 1e9)
            if left <= 0:
                raise TimeoutError(f"nobody has saved {key!r} within {timeout} s")
            core.wait(key, bell, min(left, _LOOK))

    def get_or_create(
        self,
        key: str,
        fn: Callable[[], Any],
        timeout: float = -1,
        *,
        ttl: float | None = None,
        mode: str | None = None,
        allow_pickle: bool = False,
    ) -> Any:
        """Return what a name stands for; where there is none, exactly one process makes it by ``fn()`` and saves it.

        The others wait and get the same memory. When the one at work fails, its caller gets the error; when it fails or dies, one of
        those who wait takes over.

        Parameters
        ----------
        key : str
        fn : callable
        timeout : float
            Seconds to wait for another process's ``fn``; ``-1``: as long as it works.
        ttl, mode, allow_pickle
            As for :meth:`save` and :meth:`load`.

        Raises
        ------
        TimeoutError
            When the time is up and another process is still at it.
        """
        return self._get_or_create(key, fn, timeout, ttl=ttl, mode=mode, allow_pickle=allow_pickle)

    def _get_or_create(
        self,
        key: str,
        fn: Callable[[], Any],
        timeout: float,
        *,
        ttl: float | None,
        mode: str | None,
        allow_pickle: bool,
        waiting: Callable[[dict[str, Any]], None] | None = None,
    ) -> Any:
        """``get_or_create``; `waiting` is called with the mark of the one at work, every now and then."""
        if mode is not None and mode not in _values.MODES:
            raise ValueError(f"mode is 'r', 'c' or 'r+', not {mode!r}")
        core = self._core
        lifetime, timeout = ttl_of(ttl), parse_seconds(timeout, "timeout")
        mark = "\0" + _checked(key)  # csrc/api/locks.cc puts up the same
        deadline = None if timeout < 0 else time.monotonic() + timeout
        while True:
            bell = core.bell(key)
            raw = None
            with contextlib.suppress(KeyError):
                raw = core.load(key, _values.MODES[mode or "r"])
            if raw is not None:
                with contextlib.suppress(StaleHandleError):  # removed or replaced after it was found
                    return self._open(core, key, raw, mode, allow_pickle)
                continue
            try:
                core.save(mark, b"", [], False, 0, True, -1)
            except KeyExistsError:
                self._wait_for_maker(core, key, mark, bell, timeout, deadline, waiting)
                continue
            try:
                if not core.contains(key):  # it may have come before the mark
                    self._save(core, key, fn(), lifetime, False)
            except KeyExistsError:
                if not core.contains(key):
                    raise
                # Saved by somebody else, without asking: theirs it is.
            finally:
                core.remove(mark)
                core.ring(key)

    def _tell_of_making(self, key: str, text: bytes) -> None:
        """Put a text into the mark of get_or_create, by the one at work at this key."""
        self._core.save("\0" + key, text, [], True, 0, True, -1)

    def _wait_for_maker(
        self,
        core: _C.Store,
        key: str,
        mark: str,
        bell: int,
        timeout: float,
        deadline: float | None,
        waiting: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        try:
            found = core.find(mark)
        except KeyError:
            return
        if found["abandoned"]:
            core.sweep()  # the service would do it soon, if there is one
            return
        if waiting is not None:
            waiting(found)
        left = FOREVER if deadline is None else int((deadline - time.monotonic()) * 1e9)
        if left <= 0:
            raise TimeoutError(f"another process has not made {key!r} within {timeout} s")
        core.wait(key, bell, min(left, 50_000_000))  # a death rings no bell

    @contextlib.contextmanager
    def storage(self) -> Iterator[None]:
        """Let NumPy and torch allocate in the store's memory, in this thread and block; what is made there is saved without a copy.

        What is saved this way is the memory itself: writing to the array later changes what others have loaded. As for
        :func:`torchshm.pooled`, zero-filled arrays (``np.zeros``) are ordinary ones.
        """
        before, tensors = self._core.allocate_here(), _tensors.enter(self._core.member_address)
        try:
            yield
        finally:
            _tensors.leave(tensors)
            _C.leave_pooled(before)

    # ---- files

    def export_to(
        self,
        path: str | os.PathLike[str],
        keys: str | Iterable[str] | None = None,
        *,
        prefix: str = "",
        format: str | None = None,
        overwrite: bool = False,
    ) -> list[str]:
        """Write arrays and tensors into a file of another library. It appears at its path whole, or not at all.

        Parameters
        ----------
        path : path
            Ends with ``.safetensors``, ``.npy`` (one array), ``.npz``, ``.zarr`` (a directory) or ``.zarr.zip``.
        keys : str or iterable of str, optional
            What to write. Default: all names that begin with `prefix`. When it is one, and a dict or list, the file has what is
            in it, by its path: ``"0.weight"``; else the key stands before that. Between them are dots, in zarr slashes.
        prefix : str
            Cut off the names in the file. Slashes in names are groups in zarr.
        format : str, optional
            The suffix, without the dot, where `path` has another one.
        overwrite : bool
            Replace what is at `path`.

        Returns
        -------
        list of str
            The keys that were written.

        Raises
        ------
        FileExistsError
            When there is something at `path` and `overwrite` is not set.
        TypeError
            For values or dtypes that the format has not; it says which, and what has.
        ValueError
            For a suffix that is not known, and for keys that can't be names in that file, or would be the same.
        KeyError
            When there is no such name.
        ImportError
            When the library of that format is not installed.
        """
        from torchshm import _exchange

        return _exchange.export(self, path, keys, prefix=prefix, format=format, overwrite=overwrite)

    def import_from(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: str = "",
        key: str | None = None,
        format: str | None = None,
        framework: str | None = None,
        overwrite: bool = False,
        ttl: float | None = None,
        policy: str | None = None,
    ) -> list[str]:
        """Save the arrays of a file of another library, one after the other, read straight into the store's memory.

        Parameters
        ----------
        path : path
            As for :meth:`export_to`.
        prefix : str
            Put before the names in the file. The array of an ``.npy`` file has the file's name, without the suffix.
        key : str, optional
            Save all of it as one value of this name, a dict by name, such as a state_dict; of an ``.npy`` file its array.
        format : str, optional
            The suffix, without the dot, where `path` has another one.
        framework : {"np", "pt"}, optional
            Save arrays or torch's tensors. Default: arrays; of a safetensors file tensors if its metadata say that it was made for
            torch, and for dtypes that NumPy has not.
        overwrite : bool
            Replace names that are there. Else the import begins only when there is none of them.
        ttl, policy
            As for :meth:`save`.

        Returns
        -------
        list of str
            The keys that were saved.

        Raises
        ------
        KeyExistsError
            When a name is taken and `overwrite` is not set.
        ValueError
            When the file is damaged, or not of that format. What was saved until then is removed again, as after any other error;
            what was replaced stays replaced.
        TypeError
            For dtypes that can't lie in a store.
        ImportError
            When the library of that format is not installed.
        """
        from torchshm import _exchange

        return _exchange.import_(
            self,
            path,
            prefix=prefix,
            key=key,
            format=format,
            framework=framework,
            overwrite=overwrite,
            ttl=ttl,
            policy=policy,
        )

    def snapshot(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, skip_damaged: bool = False
    ) -> list[str]:
        """Write all names into a file that :func:`torchshm.open` and ``start(file=)`` read, while others go on with the store.

        Everything that a store holds is copied as it is, pickled objects and modules too; nothing is unpickled. Each name has a value
        that was saved whole, of some moment between call and return: what is removed meanwhile may be left out, and what is saved
        meanwhile may be in it. Writing to values in place (mode ``"r+"``) is seen in parts. What is left of a ttl is kept, and so are
        policies and the store's own settings: served, the file is a store with the same limit.

        Parameters
        ----------
        path : path
            The file appears there whole or not at all.
        overwrite : bool
            Replace what is there. Who has opened that keeps it.
        skip_damaged : bool
            Leave out values that can't be read, such as those whose file in the spill directory is gone; a RuntimeWarning names them.

        Returns
        -------
        list of str
            The keys in it.

        Raises
        ------
        FileExistsError
            When there is something at `path` and `overwrite` is not set.
        PoolFullError
            When the disk has no room.
        StoreUnavailableError
            When the store is not served: the process that writes the file finds it by its service.
        TorchshmError
            When values can't be read and `skip_damaged` is not set; it names them, and nothing is written.
        """
        from torchshm import _snapshot

        return _snapshot.snapshot(self, path, overwrite=overwrite, skip_damaged=skip_damaged)

    # ---- modules

    def save_module(
        self, key: str, module: torch.nn.Module, ttl: float | None = None, overwrite: bool = False
    ) -> None:
        """Save a torch module: parameters, buffers, those too that its state_dict leaves out, and how to make it, where pickle can.

        Parameters
        ----------
        key, ttl, overwrite
            As for :meth:`save`, and the same errors.
        module : torch.nn.Module
            On the CPU. Tied parameters are stored once.
        """
        from torchshm import _modules

        self._save(self._core, _checked(key), _modules.describe(module), ttl_of(ttl), overwrite)

    def load_module(
        self,
        key: str | Iterable[str],
        module: torch.nn.Module | Callable[[], torch.nn.Module] | None = None,
        *,
        timeout: float = 0,
        mode: str | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
    ) -> torch.nn.Module:
        """Return a module whose parameters and buffers lie in the store, without a copy of them.

        Unlike with ``load_state_dict`` nothing is copied into the module: its parameters become views of the store's memory. They
        stay the objects that they are, so optimizers and ties stay too, and keep their ``requires_grad``; their dtype is that of
        what was saved. Processes that load the same key have one copy of it in memory together.

        Parameters
        ----------
        key : str or iterable of str
            What :meth:`save_module` has saved, or :meth:`save` as a state_dict; several for one that is in parts.
        module : torch.nn.Module or callable, optional
            The module to fill, which may be on the meta device, or a function that makes it, called with the meta device as default
            and, if that does not do, as it is. Default: the module is unpickled as ``torch.load`` would, from one key.
        timeout : float
            As for :meth:`load`.
        mode : {"c", "r+"}, optional
            ``"c"``, the default: what training writes stays in this process, a page of memory for each page that is written to. All
            that one process has loaded from a key sees it: ``copy.deepcopy`` makes a second module that is apart.
            ``"r+"``: all processes train the same parameters (Hogwild).
        strict : bool
            Whether names that are missing on either side are errors.
        allow_pickle : bool
            Unpickle the module, or values among it that need that; it runs code that the saver chose.

        Returns
        -------
        torch.nn.Module
            `module` itself, if one was given.

        Raises
        ------
        KeyError, TimeoutError
            As :meth:`load`.
        RuntimeError
            When names or shapes do not fit; nothing is changed then.
        ValueError
            When it needs ``allow_pickle=True``, or `module`, since it can't be pickled.
        """
        from torchshm import _modules

        if mode == "r":
            raise ValueError("parameters can't be read-only: mode is 'c' or 'r+'")
        keys = [key] if isinstance(key, str) else list(key)
        values = self.load(keys, timeout=timeout, mode=mode, allow_pickle=allow_pickle)
        if module is None:
            if len(keys) != 1:
                raise TypeError("load_module() of several keys needs the module, or a function that makes it")
            return _modules.whole(keys[0], values[0], allow_pickle)
        state = _modules.State()
        for each, value in zip(keys, values, strict=True):
            state.add(each, value)
        return _modules.into(module, state, strict)

    # ---- locks

    def lock(self, key: str | None = None, *, shared: bool = False, timeout: float = -1) -> Lock:
        """Return an advisory lock: ``with store.lock("weights"): ...``.

        It keeps out those who take it too, in this and in other processes, and nobody else: values can be loaded and saved without. A
        process that dies, also by SIGKILL, lets go of what it held.

        Parameters
        ----------
        key : str, optional
            Whose lock; there need not be a value of that name. Default: the store's own, which has nothing to do with those of keys.
        shared : bool
            Many may hold it shared at once; or one, not shared. Who waits for it alone gets it when nobody has it at all.
        timeout : float
            Seconds to wait for it; ``-1``: as long as it takes, ``0``: one try.

        Returns
        -------
        Lock
            Not held yet: by ``with``, or by its ``acquire()`` and ``release()``.
        """
        return Lock(self, None if key is None else _checked(key), shared, parse_seconds(timeout, "timeout"))

    # ---- memory and disk

    def set_policy(self, key: str, policy: str) -> None:
        """Say what may become of a value when the store needs room, as :meth:`save` does.

        Raises
        ------
        KeyError
            When there is no such name.
        """
        if not self._core.set_policy(_checked(key), policy_of(policy)):
            raise KeyError(key)

    def prefetch(self, keys: str | Iterable[str]) -> None:
        """Begin to bring values back from disk, in this order, and return at once; they are loaded sooner then.

        As many as fit into a quarter of the limit: more would push out what is in use. The rest, and all errors, are left to
        :meth:`load`.
        """
        wanted = [_checked(key) for key in ([keys] if isinstance(keys, str) else keys)]
        _prefetch.begin(self._core, wanted)

    # ---- names

    def contains(self, key: str) -> bool:
        """Whether there is such a name."""
        return self._core.contains(_checked(key))

    def remove(self, key: str) -> None:
        """Free a name at once. Who holds the data keeps it.

        Raises
        ------
        KeyError
            When there is no such name.
        """
        if not self._core.remove(_checked(key)):
            raise KeyError(key)

    def keys(self, prefix: str = "") -> list[str]:  # type: ignore[override]
        """All names that begin with `prefix`, sorted."""
        return self._core.keys(prefix)

    def info(self, key: str | None = None) -> dict[str, Any]:
        """Figures about a name, or about the store.

        Returns
        -------
        dict
            Of a name: ``kind`` ("array", "values" or "object"), ``bytes`` (of its blocks, or of its file), ``blocks``, ``created`` (seconds
            since 1970), ``expires_in`` (seconds, or None), ``pid`` of who saved it, ``where`` ("memory" or "disk"), ``policy``.
            Of the store: ``name``, ``names``, ``created``, ``ttl``, ``saved``, ``removed``, ``expired``, ``service_pid``, ``live_bytes``,
            ``committed_bytes``, ``warm_bytes``, ``control_bytes``, ``limit_bytes``, ``blocks``, ``leases``, ``policy``,
            ``spill_directory``;
            now on disk and not in memory ``spilled_names``, ``spilled_bytes``; and since the store began ``loads``, ``spills`` and
            ``spilled_total_bytes`` (memory given up for a file), ``written`` and ``written_bytes`` (files), ``restores`` and
            ``restored_bytes``, ``evictions`` (names dropped), ``spill_errors``, ``room_waits``; ``tickets`` and
            ``ticket_bytes`` (unreceived messages, and the blocks that they keep), ``pages`` ("auto", "4KiB" or "2MiB") and ``processes``: a
            list of dicts with ``pid``, ``name``, ``held_bytes`` and ``held_blocks`` for each process that has the store.
        """
        if key is None:
            figures = self._core.info()
            return {**figures, "policy": POLICIES[figures["policy"]]}
        found = self._core.find(_checked(key))
        found["policy"] = POLICIES[found["policy"]]
        kind = _values.kind_of(found.pop("text"))
        del found["bound"], found["abandoned"], found["cell"], found["life"]
        return {"kind": kind, **found}

    def __getitem__(self, key: str) -> Any:
        return self.load(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.save(key, value, overwrite=True)

    def __delitem__(self, key: str) -> None:
        self.remove(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key[:1] not in ("", "\0") and self.contains(key)

    def __len__(self) -> int:
        return self._core.size()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __bool__(self) -> bool:
        return True  # also an empty one

    def sync(self) -> None:
        """Write a persistent store to the disk, so that what is in it now survives a loss of power.

        The death of processes needs none of it. Beside the file, in ``PATH.synced``, it records a checksum of every value, by which
        ``torchshm check --repair`` tells afterwards what is as it was. Takes the time to read all values and to write what has changed.
        One process or thread does it at a time, and others wait.

        Raises
        ------
        TorchshmError
            For a store in memory, when the disk fails, and when the file was removed or replaced.
        OSError
            When the record can't be written.
        """
        from torchshm import _persistence

        _persistence.sync(self._core)

    # ---- the end

    def close(self) -> None:
        """Stop using the store, and serving it if that is done here. Arrays that were loaded stay valid, names stay too.

        The process stays a member of the store's pool until it ends, and can be one of 16 pools.
        """
        self._closed = True
        self._held = None
        if self._end is not None:
            self._end()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
