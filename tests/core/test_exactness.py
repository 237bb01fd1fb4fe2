"""Parts equal the unsplit model to the bit: float32, CPU, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.quickstart import load_split_model

KINDS = ["llama", "llama-tied", "qwen2", "qwen2-tied", "qwen2-sliding", "gpt2"]
CUTS = [[2, 4], [1, 5], [1, 3, 4]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of ids, two of them padded on the left."""
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :2] = 0
    return ids, mask


def load_chain(path: Any, model_type: str, cut: list[int], **kwargs: Any) -> list[SplitModel]:
    bottom, trunk, top = load_split_model(model_type, cut, path, **kwargs)
    return [bottom, *(trunk if isinstance(trunk, list) else [trunk]), top]


def run(chain: list[SplitModel], value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    for part in chain:
        value = part(value, **kwargs)
    return value.logits  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(
    kind: str, cut: list[int], low_memory: bool, make_checkpoint: Callable[..., Any]
) -> None:
    checkpoint = make_checkpoint(kind)
    ids = torch.arange(14).reshape(2, 7)

    chain = load_chain(checkpoint.path, checkpoint.model_type, cut, low_memory=low_memory)

    assert torch.equal(run(chain, ids), checkpoint.unsplit()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_matters(kind: str, make_checkpoint: Callable[..., Any]) -> None:
    """The control: without its Trunk the chain must differ, or the tests above show nothing."""
    checkpoint = make_checkpoint(kind)
    ids = torch.arange(14).reshape(2, 7)
    bottom, _, top = load_chain(checkpoint.path, checkpoint.model_type, [2, 4])

    difference = (run([bottom, top], ids) - checkpoint.unsplit()(ids).logits).abs().max()

    assert difference > 1e-3


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_padded_prefill_and_cached_decode(
    kind: str, cut: list[int], make_checkpoint: Callable[..., Any], inputs: Any
) -> None:
    ids, mask = inputs
    checkpoint = make_checkpoint(kind)
    unsplit = checkpoint.unsplit()
    chain = load_chain(checkpoint.path, checkpoint.model_type, cut, low_memory=True)
    whole_cache = DynamicCache(config=unsplit.config)
    caches = [part.new_cache() for part in chain]

    for start, end in [(0, 5), (5, 6), (6, 7), (7, 9)]:
        value = ids[:, start:end]
        for part, cache in zip(chain, caches, strict=True):
            value = part(value, attention_mask=mask[:, :end], past_key_values=cache)
        expected = unsplit(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=whole_cache
        )
        assert torch.equal(value.logits, expected.logits)
    assert [cache.get_seq_length() for cache in caches] == [9] * len(chain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.9, "top_k": 40},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3, "do_sample": False},
    ],
    ids=["greedy", "sampled", "uncached", "beams"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_generate(
    kind: str, arguments: dict[str, Any], make_checkpoint: Callable[..., Any], inputs: Any
) -> None:
    ids, mask = inputs
    checkpoint = make_checkpoint(kind)
    model = SplitCausalLM(*load_split_model("auto", [2, 4], checkpoint.path, low_memory=True))
    arguments |= {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}

    torch.manual_seed(7)
    expected = checkpoint.unsplit().generate(ids, **arguments)
    torch.manual_seed(7)
    produced = model.generate(ids, **arguments)

    assert torch.equal(produced, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "gpt2"])
def test_gradients(kind: str, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(kind)
    with torch.inference_mode(mode=False):
        ids = torch.arange(14).reshape(2, 7)
        unsplit = checkpoint.unsplit()
        model = SplitCausalLM(*load_split_model("auto", [2, 4], checkpoint.path))

        expected = unsplit(ids, labels=ids)
        produced = model(ids, labels=ids)
        expected.loss.backward()
        produced.loss.backward()

    assert torch.equal(produced.loss, expected.loss)
    layer = dict(unsplit.named_parameters())
    name = next(n for n in layer if ".3." in n and n.endswith("weight"))
    ours = dict(model.trunks[0].model.named_parameters())[name]  # type: ignore[union-attr]
    assert torch.equal(ours.grad, layer[name].grad)


@pytest.mark.parametrize("cut", [[0, 3], [3, 6], [0, 6]], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen2-sliding", "gpt2"])
def test_empty_ends(kind: str, cut: list[int], make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(kind)
    ids = torch.arange(14).reshape(2, 7)
    chain = load_split_model("auto", cut, checkpoint.path, low_memory=True, allow_empty=True)
    model = SplitCausalLM(*chain)

    assert torch.equal(model(ids).logits, checkpoint.unsplit()(ids).logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0),
        checkpoint.unsplit().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: str, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(kind, dtype=dtype)
    ids = torch.arange(14).reshape(2, 7)

    chain = load_chain(checkpoint.path, checkpoint.model_type, [2, 4], low_memory=True)

    assert {part.dtype for part in chain} == {getattr(torch, dtype)}
    assert torch.equal(run(chain, ids), checkpoint.unsplit()(ids).logits)


def test_hub_named_gpt2(hub_named_gpt2: Any) -> None:
    ids = torch.arange(14).reshape(2, 7)
    expected = hub_named_gpt2.unsplit()(ids).logits
    for low_memory in (False, True):
        chain = load_chain(hub_named_gpt2.path, "gpt2", [2, 4], low_memory=low_memory)
        assert torch.equal(run(chain, ids), expected)


def test_full_component_is_the_unsplit_model(make_checkpoint: Callable[..., Any]) -> None:
    from splitlearn_core.factory import load_component  # noqa: PLC0415

    checkpoint = make_checkpoint("qwen2-tied")
    ids = torch.arange(14).reshape(2, 7)
    full = load_component(checkpoint.path, "full")

    assert torch.equal(full(ids).logits, checkpoint.unsplit()(ids).logits)
    assert full(ids, use_cache=True).past_key_values.get_seq_length() == 7
