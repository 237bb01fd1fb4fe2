"""Pages of mapped files are given back as soon as a tensor has been copied, and no others ever."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core import ModelFactory, mappings
from splitlearn_core.factory import load_component
from splitlearn_core.loading.pages import MappedPages
from splitlearn_core.loading.sources import StateDictSource

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")

KIB = 1024


def resident(file: Path) -> int:
    """Return how many bytes of a mapped file this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and key == "Rss:":
            total += int(rest[0]) * KIB
    return total


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with two tensors of 1 MiB; the second one begins within a page."""
    tensors = {"a": torch.arange(1 << 18, dtype=torch.int32), "b": torch.ones(1 << 18)}
    save_file({**tensors, "between": torch.zeros(3)}, tmp_path / "two.safetensors")
    return tmp_path / "two.safetensors"


def test_what_was_given_back_is_not_resident_and_can_be_read_again(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        first, second = opened.get_tensor("a"), opened.get_tensor("b")
        sums = first.sum(), second.sum()
        assert resident(file) >= 2048 * KIB

        given_back = MappedPages()
        given_back.give_back(first)
        assert 1024 * KIB <= resident(file) < 1100 * KIB
        given_back.give_back(second)
        assert resident(file) < 100 * KIB

        assert (first.sum(), second.sum()) == sums
        assert torch.equal(opened.get_tensor("a"), torch.arange(1 << 18, dtype=torch.int32))


def test_pages_that_others_share_stay(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor("b")
        tensor[:8] = 7  # in the page where the one before it ends: a private copy of that
        tensor[-8:] = 7
        assert tensor.data_ptr() % 4096

        MappedPages().give_back(tensor)

        assert (tensor[:8].tolist(), tensor[-8:].tolist()) == ([7.0] * 8, [7.0] * 8)


@pytest.mark.parametrize("count", [0, 1, 1 << 20])
def test_memory_of_another_kind_is_left_alone(file: Path, count: int) -> None:
    given_back = MappedPages()
    with safe_open(file, framework="pt") as opened:
        given_back.give_back(opened.get_tensor("a"))
        private = torch.ones(count)

        given_back.give_back(private)

    assert torch.equal(private, torch.ones(count))


def test_where_nothing_says_what_is_mapped_nothing_is_given_back(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_MAPS", file / "nowhere")
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor("a")
        tensor.sum()

        MappedPages().give_back(tensor)

        assert resident(file) >= 1024 * KIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Llama whose layers take 3 MiB each, in tensors of up to 512 KiB."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def watched_load(checkpoint: Path, component: str, **options: Any) -> tuple[Any, list[int]]:
    """Load a part; return it, and what was resident of the file before each tensor."""
    seen: list[int] = []
    file = checkpoint / "model.safetensors"
    part = load_component(
        checkpoint, component, (1, 5), progress=lambda *_: seen.append(resident(file)), **options
    )
    return part, seen


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"mmap": False}], ids=str)
def test_a_load_that_copies_never_has_much_of_the_file(
    checkpoint: Path, options: dict[str, Any]
) -> None:
    _, seen = watched_load(checkpoint, "trunk", **options)

    assert len(seen) > 30
    assert max(seen) < 3 * 1024 * KIB  # of 12 MiB: what is being copied, and what is read ahead


@pytest.mark.parametrize("component", ["bottom", "trunk", "top", "full"])
def test_what_was_copied_is_what_was_stored(checkpoint: Path, component: str) -> None:
    """A tied head is read by the Bottom and the Top; a whole model has it once."""
    stored, _ = watched_load(checkpoint, component)
    cast, _ = watched_load(checkpoint, component, dtype="float64")
    private, _ = watched_load(checkpoint, component, mmap=False)

    wanted = stored.state_dict()
    assert wanted
    for part in (cast, private):
        assert part.state_dict().keys() == wanted.keys()
        for name, value in part.state_dict().items():
            assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name


def test_a_whole_model_that_others_have_stays_as_it_is(checkpoint: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    source = StateDictSource(whole.state_dict(), "a model")
    for name in source.names():
        source.copied(source.read(name))
    ModelFactory.create_split_models("llama", str(checkpoint), 1, 5, dtype="bfloat16")

    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
