"""Keep TVM's own notes off a user's terminal."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Printed on each save and load of a program, with nothing after the colon.
_NOISE = (b"Warning: Scope Saving:", b"Warning: Scope Loaded:")


@contextmanager
def without_notes() -> Iterator[None]:
    """Whatever TVM writes to the process's standard error inside, less the lines that say nothing."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            said = [line for line in caught.read().splitlines(keepends=True) if not line.rstrip().endswith(_NOISE)]
            if said:
                os.write(2, b"".join(said))
