"""Fixtures of the tests of single commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from checkpoints import damaged, make_checkpoint
from typer.testing import CliRunner, Result

from splitlearn_manager.cli import app

__all__ = ["damaged", "make_checkpoint"]


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Return a function that runs a command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)))

    return run


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a command as people do."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "splitlearn_manager", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
