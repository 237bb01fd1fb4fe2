"""The README's samples run as they are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SAMPLES = re.findall(r"```python\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL)


def test_the_samples(daemon: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    cut, remote, embedded = SAMPLES
    models = yaml.safe_load(Path("configs/demo-trunk.yaml").read_text("utf-8"))["models"]

    with daemon(models) as address:
        exec(cut + remote.replace("http://127.0.0.1:8000", address), {})  # noqa: S102 - our own
    local, through_the_daemon = capsys.readouterr().out.split("<s>")[1:]
    exec(embedded, {"__name__": "sample"})  # noqa: S102

    assert through_the_daemon.strip() == local.strip()
    assert "torch.Size([1, 4, 192])" in capsys.readouterr().out
