"""How the commands fail: one line on standard error, and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from splitlearn_core.errors import (
    CheckpointError,
    FetchError,
    ModelSourceError,
    StorageError,
    UnsupportedModelError,
)

FAILED = 1
WRONG_USAGE = 2

# The network, the disk or the memory did not do what they should.  It comes first: a hub that can't
# be reached is both, and may well have the model.
_FAILURE = (FetchError, StorageError, MemoryError)
# The model, or what is asked of it, is not what it should be: asking again won't help.
_USAGE = (ModelSourceError, CheckpointError, UnsupportedModelError, FileExistsError, ValueError)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn the errors that people can cause or mend into a line and an exit code."""
    try:
        yield
    except _FAILURE as error:
        raise _leave(error, FAILED) from error
    except _USAGE as error:
        raise _leave(error, WRONG_USAGE) from error
    except OSError as error:
        raise _leave(error, FAILED) from error


def _leave(error: BaseException, code: int) -> typer.Exit:
    """Say what is wrong."""
    text = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"splitlearn: {text}\n")
    return typer.Exit(code)
