"""A batch made in the pool, on its way out of the worker that made it.

Without a pool a consumer's arrays are its own: the worker may go on writing to the buffer that it returned, or keep a sample and return
it again. In the pool an array is sent by reference, so it has to be known whether anything in the worker still looks at its memory.
Reference counts can't tell, as any object may hold any other. So the batch is pickled and let go of, and then the pool is asked, which
counts the objects that look at each block. What is still looked at, or was in the message twice, is copied, once the batch has been
unpickled again.
"""

from __future__ import annotations

import pickle
from typing import Any

from torchshm import _C, _sharing


class Parcel:
    """Unpickles as the batch that it was made of."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return pickle.loads, (self.text,)


def pack(box: list[Any]) -> Any:
    """What to send for the batch that is alone in `box`, and referred to by nothing else on the stack; leaves the box empty."""
    _C.batch_begin()
    try:
        try:
            text = _sharing.dumps(box[0])
        except Exception:
            return box.pop()  # let the queue raise it where it always does
        box.clear()
        if _C.batch_look():
            text = _sharing.dumps(pickle.loads(text))
        return Parcel(text)
    finally:
        _C.batch_end()
