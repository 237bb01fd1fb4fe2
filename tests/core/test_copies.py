"""A copy of a part, or of a chain, is a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.passage import Passage
from splitlearn_core.quickstart import load_split_model

IDS = torch.tensor([[5, 9, 17, 5, 23], [3, 4, 5, 6, 7]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that loads the parts of a small model of a type."""
    root: Path = tmp_path_factory.mktemp("models")

    def find(model_type: str, points: tuple[int, ...] = (2, 4)) -> Any:
        folder = root / model_type
        if not folder.exists():
            tiny_model(model_type).save_pretrained(folder)
        return load_split_model("auto", points, folder, low_memory=True, allow_empty=True)

    return find


@pytest.mark.parametrize("points", [(2, 4), (2, 6)], ids=["three", "head alone"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text", "deepseek_v4"])
@torch.no_grad()
def test_a_copied_chain_computes_the_same_and_stands_alone(
    model_type: str,
    points: tuple[int, ...],
    load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = SplitCausalLM(*load(model_type, points))
    expected = chain(IDS).logits
    twin = copy.deepcopy(chain)
    assert type(twin) is type(chain)

    begun = []
    begin = Passage.begin
    monkeypatch.setattr(
        Passage, "begin", lambda self, *args: (begun.append(id(self)), begin(self, *args))[1]
    )
    for weight in chain.parameters():
        weight.zero_()

    assert torch.equal(twin(IDS).logits, expected)
    assert not set(begun) & {id(part._passage) for part in chain.parts}
    assert not torch.equal(chain(IDS).logits, expected)
    generated = twin.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 8)


@torch.no_grad()
def test_a_copy_runs_while_the_original_is_in_its_forward(load: Callable[..., Any]) -> None:
    """Were they to share the place where a forward finds its input, this would mix them up."""
    bottom, trunk, _ = load("gemma3n_text")
    twin: SplitModel = copy.deepcopy(trunk)
    one, other = bottom(IDS), bottom(IDS.flip(0))
    expected, expected_other = trunk(one).tensor, trunk(other).tensor
    meanwhile: list[torch.Tensor] = []
    layer = trunk.model.get_submodule(trunk._family.layers)[2]
    layer.register_forward_pre_hook(lambda *_: meanwhile.append(twin(other).tensor))

    assert torch.equal(trunk(one).tensor, expected)
    assert torch.equal(meanwhile[0], expected_other)


def test_a_copied_part_takes_only_its_own_bytes(load: Callable[..., Any]) -> None:
    """Its weights may be views of a file that holds the whole model."""
    _, trunk, top = load("llama")

    for part in (trunk, top):
        twin = copy.deepcopy(part)
        held = {w.untyped_storage().data_ptr(): w.untyped_storage() for w in twin.parameters()}
        assert sum(storage.nbytes() for storage in held.values()) <= part.nbytes
        assert not set(held) & {w.untyped_storage().data_ptr() for w in part.parameters()}


def test_a_part_that_is_elsewhere_is_the_same_in_both(load: Callable[..., Any]) -> None:
    bottom, trunk, top = load("llama")

    class Elsewhere:
        component, start_layer, end_layer = "trunk", 2, 4

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a connection can't be copied")

        def __call__(self, hidden: Any, **kwargs: Any) -> Any:
            return trunk(hidden, **kwargs)

    chain = SplitCausalLM(bottom, Elsewhere(), top)
    twin = copy.deepcopy(chain)

    assert twin.parts[1] is chain.parts[1]
    assert torch.equal(twin(IDS).logits, chain(IDS).logits)
