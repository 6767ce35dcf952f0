"""What can go wrong, by name. Every class is also the built-in exception that fits, so old handlers still catch it."""


class TorchshmError(Exception):
    """Base of all errors that torchshm raises by itself."""


class PoolFullError(TorchshmError, MemoryError):
    """The pool's limit, or the memory of the machine or cgroup, is reached. The message says who holds what."""


class StaleHandleError(TorchshmError, LookupError):
    """A handle whose block has been released since, or bytes that are no valid handle."""


class KeyExistsError(TorchshmError, KeyError):
    """A name is taken already."""


class StoreUnavailableError(TorchshmError, ConnectionError):
    """The pool or store that holds the data can't be reached from this process."""
