"""Parts on a GPU; each test also runs on the CPU, where it is seen to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.quickstart import load_split_model
from splitlearn_core.transfers import on_device

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
POINTS = [2, 4]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
on_each = pytest.mark.parametrize("device", ["cpu", GPU])
in_each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
PADDED[1, :2] = 0


@on_each
@in_each_dtype
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2-sliding"])
def test_parts_are_the_unsplit_model_on_the_same_device(
    make_checkpoint: Callable[..., Any], kind: str, dtype: str, device: str
) -> None:
    checkpoint = make_checkpoint(kind)
    whole = checkpoint.unsplit(dtype=getattr(torch, dtype)).to(device)
    parts = load_split_model("auto", POINTS, checkpoint.path, device=device, dtype=dtype)
    chain = SplitCausalLM(*parts)
    ids, mask = IDS.to(device), PADDED.to(device)

    with torch.no_grad():
        expected, found = whole(ids, attention_mask=mask), chain(ids, attention_mask=mask)
        from_here = chain(IDS, attention_mask=PADDED)  # each part brings its input over
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = [model.generate(ids, **asked).tolist() for model in (whole, chain)]

    for part in parts:
        assert isinstance(part, SplitModel)
        assert (part.device.type, str(part.dtype)) == (device, f"torch.{dtype}")
        assert {tensor.device.type for tensor in part.parameters()} == {device}
    assert found.logits.device.type == device
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(from_here.logits, expected.logits)
    assert tokens[0] == tokens[1]


@on_each
def test_parts_on_several_devices_hand_over_and_take_gradients_back(
    make_checkpoint: Callable[..., Any], device: str
) -> None:
    checkpoint = make_checkpoint("llama")
    bottom, trunk, top = load_split_model(
        "auto", POINTS, checkpoint.path, device_map={"trunk": device}, low_memory=True
    )
    assert [part.device.type for part in (bottom, trunk, top)] == ["cpu", device, "cpu"]
    whole = checkpoint.unsplit()

    logits = top(trunk(bottom(IDS))).logits
    expected = whole(IDS).logits
    for one in (logits, expected):
        one.square().mean().backward()

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    wanted = dict(whole.named_parameters())
    for part in (bottom, trunk, top):
        for name, parameter in part.model.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                parameter.grad.cpu(), wanted[name].grad, rtol=1e-3, atol=1e-5
            )


@pytest.mark.gpu(2)
def test_the_automatic_map_takes_two_devices(make_checkpoint: Callable[..., Any]) -> None:
    parts = load_split_model(
        "auto", POINTS, make_checkpoint("llama").path, device_map="auto", low_memory=True
    )

    assert str(parts[1].device) != str(parts[2].device)
    chain = SplitCausalLM(*parts)
    with torch.no_grad():
        found = chain(IDS).logits.cpu()
        expected = make_checkpoint("llama").unsplit()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@on_each
def test_a_saved_part_comes_back_on_the_device(
    make_checkpoint: Callable[..., Any], device: str, tmp_path: Any
) -> None:
    trunk = load_component(make_checkpoint("llama").path, "trunk", POINTS, device=device)
    trunk.save(tmp_path / "trunk")

    again = SplitModel.load(tmp_path / "trunk", device=device)

    assert again.device.type == device
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trunk.state_dict()[name]), name


@on_each
def test_caches_are_where_their_part_is(make_checkpoint: Callable[..., Any], device: str) -> None:
    trunk = load_component(make_checkpoint("llama").path, "trunk", POINTS, device=device)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    cache = trunk.new_cache()

    with torch.no_grad():
        whole = trunk(hidden)
        pieces = [trunk(hidden[:, i : i + 1], past_key_values=cache) for i in range(5)]

    assert {layer.keys.device.type for layer in cache.layers if layer.keys is not None} == {device}
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheMismatchError):
        trunk(hidden, use_cache=True)


@on_each
def test_what_comes_from_the_cpu_comes_by_page_locked_memory(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    locked: list[torch.Tensor] = []
    pin = torch.Tensor.pin_memory

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor)
        return pin(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", noted)
    plain, trained = torch.arange(6.0), torch.ones(2, requires_grad=True)
    given = HiddenState(torch.ones(1, 2, 4), {"places": torch.tensor([[0, 1]])})

    there, trained_there = (on_device(t, torch.device(device)) for t in (plain, trained))
    moved = given.to(device)
    again = on_device(there, torch.device(device))
    trained_there.sum().backward()

    assert (there.tolist(), moved.side["places"].tolist()) == (plain.tolist(), [[0, 1]])
    assert {t.device.type for t in (there, moved.tensor, moved.side["places"])} == {device}
    assert again is there
    assert trained.grad is not None
    assert len(locked) == (3 if device == "cuda" else 0)  # not the one that needs gradients
    assert device == "cuda" or there is plain


@no_gpu
def test_a_gpu_that_is_not_there_is_named(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    said = "device cuda is not there: this machine has cpu"
    with pytest.raises(ValueError, match=said):
        load_component(path, "trunk", POINTS, device="cuda")
    with pytest.raises(ValueError, match="device cuda:1 is not there"):
        load_split_model("auto", POINTS, path, device_map={"trunk": "cuda:1"})
    with pytest.raises(ValueError, match=said):
        estimate_component(path, "trunk", POINTS, device="cuda")
    load_component(path, "trunk", POINTS).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=said):
        SplitModel.load(tmp_path / "saved", device="cuda")
