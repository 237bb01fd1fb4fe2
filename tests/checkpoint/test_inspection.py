"""Looking into weights files and folders, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from minimind_reference import Reference
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from splitlearn_core.checkpoint import add_lora, save_checkpoint, save_lora, save_weights
from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.inspection import inspect
from splitlearn_core.sharded import save_dcp
from splitlearn_core.split_checkpoint import split_checkpoint
from splitlearn_manager.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoints import Checkpoint


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_a_safetensors_file_from_its_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)

    found = inspect(path)

    assert {(t.name, t.dtype, t.shape, t.nbytes) for t in found.tensors} == {
        ("a", "float32", (2, 3), 24),
        ("b", "bfloat16", (4,), 8),
    }
    assert (found.kind, found.nbytes, found.values) == ("safetensors file", 32, 10)


def test_torch_is_not_imported_for_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "w.safetensors")
    code = (
        "import sys; from splitlearn_core.inspection import inspect; "
        f"inspect({str(tmp_path / 'w.safetensors')!r}); print('torch' in sys.modules)"
    )

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert printed.stdout.strip() == "False"


def test_folders_of_models_parts_and_adapters(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    sharded = make_checkpoint("llama", shard_size="50KB")
    split_checkpoint(checkpoint.path, [2, 4], tmp_path / "parts")
    model = checkpoint.unsplit()
    add_lora(model, rank=2, alpha=4)
    save_lora(model, tmp_path / "adapter")

    whole = inspect(checkpoint.path)
    shards = inspect(sharded.path)
    part = inspect(tmp_path / "parts" / "trunk")
    parts = inspect(tmp_path / "parts")
    adapter = inspect(tmp_path / "adapter")

    assert (whole.kind, whole.about["num_layers"], len(whole.tensors)) == ("model", 6, 57)
    assert {t.name for t in shards.tensors} == {t.name for t in whole.tensors}
    assert len({t.file for t in shards.tensors}) > 1
    assert (part.kind, part.about["component"]["name"]) == ("part", "trunk")
    assert {t.name for t in parts.tensors} == {t.name for t in whole.tensors}
    assert {t.file for t in parts.tensors} >= {"bottom/model.safetensors", "top/model.safetensors"}
    assert (adapter.kind, adapter.about["r"], adapter.about["lora_alpha"]) == ("adapter", 2, 4)


def test_a_checkpoint_of_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    folder = save_checkpoint(tmp_path, model=model, step=3)

    found = inspect(folder)

    assert found.kind == "training checkpoint"
    assert {t.shape for t in found.tensors} >= {(3, 2), (3,)}
    with pytest.raises(ModelSourceError, match="holds checkpoints; name one: "):
        inspect(tmp_path)


def test_a_folder_of_dcp_from_its_metadata(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    save_dcp(tmp_path / "dcp", model)
    checkpoint = save_checkpoint(tmp_path / "run", step=1, rate=0.5)
    shutil.copytree(tmp_path / "dcp", checkpoint / "sharded")  # as FSDP's ranks write it

    found = inspect(tmp_path / "dcp")

    assert found.kind == "DCP checkpoint"
    (weight,) = [tensor for tensor in found.tensors if tensor.name.endswith("weight")]
    assert (weight.dtype, weight.shape, weight.nbytes) == ("float32", (3, 2), 24)
    assert weight.file == "__0_0.distcp"
    assert {t.name for t in inspect(checkpoint).tensors} >= {t.name for t in found.tensors}
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        inspect(tmp_path / "dcp")


def test_a_folder_of_weights_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    torch.save(Reference().state(), out / "full_sft_64.pth")
    save_file({"a": torch.ones(2, 3)}, out / "a.safetensors")

    found = inspect(out)

    assert found.kind == "weights files"
    assert {tensor.file for tensor in found.tensors} == {"a.safetensors", "full_sft_64.pth"}
    assert found.about["full_sft_64.pth"]["minimind"]["model_type"] == "llama"
    with pytest.raises(ModelSourceError, match=r"look into out/"):
        inspect(tmp_path)
    (out / "cut_64.pth").write_bytes((out / "full_sft_64.pth").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut_64\.pth is cut off"):
        inspect(out)


@pytest.mark.parametrize(
    ("name", "reference", "taken"),
    [
        ("full_sft_64.pth", Reference(), "llama"),
        ("full_sft_64_moe.pth", Reference(experts=4), "granitemoeshared"),
        ("weights.pth", Reference(1), "llama"),
        ("dpo_64.bin", Reference(3, kv_heads=4), "qwen3"),
    ],
)
def test_minimind_files_are_known(
    tmp_path: Path, name: str, reference: Reference, taken: str
) -> None:
    torch.save(reference.state(), tmp_path / name)

    found = inspect(tmp_path / name)

    assert found.about["minimind"]["model_type"] == taken
    assert found.about["minimind"]["generation"] == reference.generation
    assert found.kind == "torch file"


def test_other_minimind_files(tmp_path: Path) -> None:
    torch.save(
        {"model": {"w": torch.ones(1)}, "step": 3, "optimizer": {}}, tmp_path / "a_resume.pt"
    )
    module = "model.layers.0.self_attn.q_proj.lora"
    factors = {f"{module}.A.weight": torch.ones(4, 8), f"{module}.B.weight": torch.ones(8, 4)}
    torch.save(factors, tmp_path / "lora_medical_8.pth")
    torch.save(Reference(heads=8).state() | {"lm_head.bias": torch.ones(1)}, tmp_path / "x_64.pth")

    training = inspect(tmp_path / "a_resume.pt")
    adapter = inspect(tmp_path / "lora_medical_8.pth")

    assert (training.kind, training.about["step"]) == ("training file", 3)
    assert training.about["beside the model"] == ["optimizer", "step"]
    assert adapter.about["minimind"] == {"kind": "adapter", "rank": 4}
    assert adapter.about["by its name"]["stage"] == "lora_medical"
    assert "minimind" not in inspect(tmp_path / "x_64.pth").about


def test_the_tensors_of_a_torch_file_are_not_read(tmp_path: Path) -> None:
    """Their bytes are holes in the file: to read them would take that much memory."""
    torch.save({"w": torch.zeros(2**26)}, tmp_path / "w.pth")
    code = (
        "import resource, torch; from splitlearn_core.inspection import inspect; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"inspect({str(tmp_path / 'w.pth')!r}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert int(printed.stdout) < 64 * 1024, printed.stderr  # KiB; the tensor has 256 MiB


def test_the_command_line_shows_it(tmp_path: Path) -> None:
    torch.save(Reference().state(), tmp_path / "full_sft_64.pth")

    told = run(tmp_path / "full_sft_64.pth")
    machine = run(tmp_path / "full_sft_64.pth", "--json")

    assert told.exit_code == 0
    assert "torch file, 39 tensors" in told.stdout
    assert "kind model, generation 2, model_type llama" in told.stdout
    assert "model.layers.0.self_attn.q_proj.weight" in told.stdout
    answer = json.loads(machine.stdout)
    assert answer["tensors"][0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "float32",
        "shape": [97, 64],
        "nbytes": 97 * 64 * 4,
        "file": "full_sft_64.pth",
    }


@pytest.mark.parametrize("way", ["cut", "flipped", "empty", "text"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files_say_so(tmp_path: Path, suffix: str, way: str) -> None:
    path = tmp_path / f"w{suffix}"
    save_weights(nn.Linear(64, 64), path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "flipped": b"\xff" * 9 + whole[9:],
            "empty": b"",
            "text": b"weights" * 100,
        }[way]
    )

    with pytest.raises(CheckpointError, match=str(path)):
        inspect(path)
    told = run(path)
    assert told.exit_code == 2
    assert str(path) in told.stderr


def test_what_is_not_there_or_hostile(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    with pytest.raises(ModelSourceError, match="there is no file or folder"):
        inspect(tmp_path / "none")
    with pytest.raises(ModelSourceError, match=r"nothing in .* holds weights"):
        inspect(tmp_path)
    (tmp_path / "w.txt").touch()
    with pytest.raises(ModelSourceError, match=r"no weights file: those end in \.safetensors"):
        inspect(tmp_path / "w.txt")
    torch.save({"w": print}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="it asks for 'print', which was not run"):
        inspect(tmp_path / "hostile.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"asks for 'torch.*Linear'.* state_dict\(\) alone"):
        inspect(tmp_path / "module.pth")
    folder = shutil.copytree(make_checkpoint("llama", shard_size="50KB").path, tmp_path / "sharded")
    min(Path(folder).glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        inspect(folder)
    manifest = {"format": "splitlearn-training", "files": {"../w.safetensors": {}}}
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="a file elsewhere"):
        inspect(tmp_path / "evil")
