"""Fixtures of the core's tests."""

from __future__ import annotations

from checkpoints import damaged, hub_named_gpt2, make_checkpoint

__all__ = ["damaged", "hub_named_gpt2", "make_checkpoint"]
