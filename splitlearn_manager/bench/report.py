"""A benchmark's figures, each beside its target, as JSON and as a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

Op = Literal["<=", ">="]

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: What was measured, and how: which part, cast or not, page cache warm or cold.
        value: The figure; `None` where it could not be measured, and the note says why.
        unit: Of value, baseline and target alike.
        op: Which way is better.
        target: What was promised; `None` where nothing was.
        baseline: What it is compared with, measured in the same run.
        note: How the target came about, and what else a reader should know.
    """

    name: str
    value: float | None
    unit: str
    op: Op
    target: float | None = None
    baseline: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; `None` without a target or a value."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.op == "<=" else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a program reads it."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "baseline": self.baseline,
            "op": self.op,
            "target": self.target,
            "met": self.met,
            "note": self.note,
        }


@dataclass(frozen=True)
class Report:
    """All figures of one run, and the machine that they are of."""

    machine: dict[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def here(cls, rows: Iterable[Row]) -> Report:
        """Return a report of this machine."""
        return cls(describe_machine(), tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a program reads it."""
        return {"machine": self.machine, "rows": [row.to_dict() for row in self.rows]}

    def to_table(self) -> str:
        """Return the report as Markdown."""
        head = ["| figure | measured | target | met | compared with |", "|---|---|---|---|---|"]
        lines = [_table_line(row) for row in self.rows]
        notes = [f"- {row.name}: {row.note}" for row in self.rows if row.note]
        machine = "; ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([*head, *lines, "", *notes, "", f"Machine: {machine}"])


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, threads, versions."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    """Return the processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _table_line(row: Row) -> str:
    target = "" if row.target is None else f"{row.op} {_number(row.target)} {row.unit}"
    value = "not measured" if row.value is None else f"{_number(row.value)} {row.unit}"
    baseline = "" if row.baseline is None else f"{_number(row.baseline)} {row.unit}"
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return f"| {row.name} | {value} | {target} | {met} | {baseline} |"


def _number(value: float) -> str:
    """Return three digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004
