"""The file that is written tensor by tensor is the one that safetensors would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from splitlearn_core.headers import read_header
from splitlearn_core.tensor_writer import TensorSpec, write_tensors


def test_the_writer_agrees_with_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every dtype, odd sizes, scalars, empty and strided tensors, and more than one chunk."""
    monkeypatch.setattr("splitlearn_core.tensor_writer._CHUNK_ELEMENTS", 5)
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.arange(7).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.arange(11),
    }
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    written = write_tensors(tmp_path / "ours", specs, tensors.__getitem__)

    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert written.nbytes == (tmp_path / "ours").stat().st_size
    infos = read_header(tmp_path / "ours")
    assert min(info.start for info in infos.values()) % 64 == 0


def test_the_writer_refuses_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w is \[3\], not \[2\]"):
        write_tensors(
            tmp_path / "f", {"w": TensorSpec(torch.float32, (2,))}, lambda _: torch.ones(3)
        )


def test_what_is_not_hashed_is_the_same_file_with_its_metadata(tmp_path: Path) -> None:
    specs = {"w": TensorSpec(torch.float32, (2,))}

    written = write_tensors(
        tmp_path / "f", specs, lambda _: torch.ones(2), metadata={"made": "here"}, hashed=False
    )

    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"made": "here", "format": "pt"}
        assert torch.equal(file.get_tensor("w"), torch.ones(2))
    assert written.sha256 == ""
