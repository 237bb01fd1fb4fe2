"""The names that people rely on, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import splitlearn_core
import splitlearn_core.utils

PURE = ["plan", "shape", "families", "headers", "errors", "estimate"]


def test_public_names() -> None:
    for name in splitlearn_core.__all__:
        assert getattr(splitlearn_core, name) is not None
    for name in splitlearn_core.utils.__all__:
        assert getattr(splitlearn_core.utils, name) is not None


def test_pure_modules_import_no_torch() -> None:
    imports = "; ".join(f"import splitlearn_core.{name}" for name in PURE)
    code = f"import sys; {imports}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert printed.strip() == "[]"
