"""Fixtures of the tests of weights, adapters and training state."""

from __future__ import annotations

from checkpoints import make_checkpoint

__all__ = ["make_checkpoint"]
