"""Long stretches of work that make many objects and no garbage, without the collector looking for some."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Reading, copying or rewriting a graph makes millions of objects that stay: collections take half of the time.

    What was made inside counts as old from then on, so that leaving does not look through all of it at once.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what a caller froze is to stay frozen
            gc.freeze()
            gc.unfreeze()
        gc.enable()
