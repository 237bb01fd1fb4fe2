"""What keeps a benchmark from being run."""

from __future__ import annotations

from splitlearn_core.errors import SplitLearnError


class BenchError(SplitLearnError, RuntimeError):
    """The machine lacks something that is needed, or a measured process failed; says what."""
