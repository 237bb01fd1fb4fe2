"""A save in the background: what it saves, when it ends, and who hears of its failure."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from save_faults.disks import CountingDisk, FullDisk
from torch import nn

from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.resume import Checkpointer, load_checkpoint, save_checkpoint
from splitlearn_core.errors import StorageError

DEADLINE = 30


class HeldDisk(Disk):
    """A disk that does not write until it may."""

    def __init__(self) -> None:
        self.asked, self.may = threading.Event(), threading.Event()

    def write(self, file: int, data: memoryview) -> int:
        """See `Disk`."""
        self.asked.set()
        assert self.may.wait(DEADLINE)
        return super().write(file, data)


def changed_by(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            parameter.data.mul_(3)


def test_it_saves_what_was_there_when_it_was_called(tmp_path: Path) -> None:
    disk = HeldDisk()
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    model[1].weight = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Checkpointer(tmp_path, disk=disk) as checkpointer:
        assert checkpointer.save(step=1, model=model, background=True) is None
        assert disk.asked.wait(DEADLINE)
        changed_by(model)
        assert checkpointer.latest() is None
        disk.may.set()
        assert checkpointer.wait() == tmp_path / "000001-step-1"

    load_checkpoint(tmp_path, model=model)

    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "bfloat16"])
def test_tensors_of_any_layout(tmp_path: Path, layout: str) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    given = {
        "transposed": values.T,
        "strided": values[:, ::2],
        "expanded": values[:, :1].expand(3, 5),
        "bfloat16": values.bfloat16(),
    }[layout]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(step=1, values=given, background=True)

    assert torch.equal(load_checkpoint(tmp_path).values["values"], given)


def test_a_failure_is_raised_by_the_next_call(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1)
    probe = CountingDisk()
    save_checkpoint(tmp_path / "probe", step=1)
    with Checkpointer(tmp_path / "probe", disk=probe) as checkpointer:
        checkpointer.save(step=2)
    checkpointer = Checkpointer(tmp_path, disk=FullDisk(probe.calls.index("write")))
    checkpointer.save(step=2, background=True)

    with pytest.raises(StorageError, match="No space left"):
        checkpointer.save(step=3)

    assert [c.step for c in checkpointer.checkpoints()] == [1]
    assert checkpointer.wait() is None
    checkpointer.close()


def test_leaving_the_block_waits_and_raises(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="No space left"),
        Checkpointer(tmp_path, disk=FullDisk(2)) as checkpointer,
    ):
        checkpointer.save(step=1, background=True)


def test_what_the_block_raises_is_not_hidden(tmp_path: Path) -> None:
    with (  # noqa: PT012 - the block is the point
        pytest.raises(ZeroDivisionError) as caught,
        Checkpointer(tmp_path, disk=FullDisk(2)) as checkpointer,
    ):
        checkpointer.save(step=1, background=True)
        raise ZeroDivisionError

    assert "a save in the background failed, too: StorageError" in caught.value.__notes__[0]


def test_one_at_a_time(tmp_path: Path) -> None:
    disk = HeldDisk()
    with Checkpointer(tmp_path, disk=disk) as checkpointer:
        checkpointer.save(step=1, background=True)
        assert disk.asked.wait(DEADLINE)
        threading.Timer(0, disk.may.set).start()
        checkpointer.save(step=2, background=True)
        assert [c.step for c in checkpointer.checkpoints()][:1] == [1]

    assert [c.step for c in checkpointer.checkpoints()] == [1, 2]


def test_the_copy_is_no_larger_than_the_state_and_is_used_again(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(step=1, model=model, background=True)
        room = checkpointer._snapshot._room
        checkpointer.wait()
        checkpointer.save(step=2, model=model, background=True)
        assert checkpointer._snapshot._room is room
        assert room.numel() <= 1.05 * 4 * 300 * 301
    assert checkpointer._snapshot.nbytes == 0


def test_the_interpreter_waits_for_it(tmp_path: Path) -> None:
    """The real thing: a script that saves last, and does not close."""
    script = (
        "import sys, torch\n"
        "from splitlearn_core.checkpoint import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1])\n"
        "checkpointer.save(step=5, values=torch.arange(3_000_000), background=True)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)

    assert load_checkpoint(tmp_path).values["values"][-1] == 2_999_999


def test_a_failure_that_nobody_waited_for_is_logged_at_the_end(tmp_path: Path) -> None:
    script = (
        "import sys, resource\n"
        "from splitlearn_core.checkpoint import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "checkpointer.save(step=5, background=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True, timeout=60, capture_output=True, text=True,
    )  # fmt: skip

    assert "what was begun in the background failed: StorageError" in done.stderr


def test_a_single_save_has_nobody_to_wait(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an owner: use a Checkpointer"):
        save_checkpoint(tmp_path, step=1, background=True)
