"""Fixtures of the core's tests."""

from __future__ import annotations

from checkpoints import damaged, hub_named_gpt2, make_checkpoint
from two_ranks import at_one, two_ranks

__all__ = ["at_one", "damaged", "hub_named_gpt2", "make_checkpoint", "two_ranks"]
