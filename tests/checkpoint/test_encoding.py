"""State that is taken apart and put together again is what it was, types and all."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitlearn_core.checkpoint.training.encoding import Encoded, decode, encode
from splitlearn_core.errors import CheckpointError, UnsavableStateError

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
)
KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.sampled_from(["$tensor", "$dict", "a"]), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=12,
)


def through_json(value: Any) -> Any:
    encoded = encode(value, "state")
    tensors = {name: tensor.clone() for name, tensor in encoded.tensors.items()}
    return decode(json.loads(json.dumps(encoded.tree)), tensors, "state.json")


def same(one: Any, other: Any) -> bool:
    """Compare values with their types, order, NaN and the sign of zero."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, other) and (
            one == other or (math.isnan(one) and math.isnan(other))
        )
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    return bool(one == other)


@given(NESTED)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert same(through_json(value), value)


def test_what_schedulers_and_modules_keep() -> None:
    weights = nn.BatchNorm1d(3).state_dict()
    state = {
        "milestones": Counter({3: 1, 7: 2}),
        "best": math.inf,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        "scalar": np.float32(0.1),
        "count": np.int64(-3),
        "weights": weights,
    }

    found = through_json(state)

    assert type(found["milestones"]) is Counter
    assert found["milestones"] == state["milestones"]
    assert found["best"] == math.inf
    assert (found["dtype"], found["device"]) == (torch.bfloat16, torch.device("cuda:1"))
    assert type(found["size"]) is torch.Size
    assert type(found["scalar"]) is np.float32
    assert found["scalar"] == np.float32(0.1)
    assert type(found["count"]) is np.int64
    assert found["weights"]._metadata == weights._metadata
    assert all(torch.equal(found["weights"][name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.tensor([2**63 - 1, -5]),
        torch.ones(3, dtype=torch.float8_e4m3fn),
        torch.ones(3).to(torch.float8_e5m2fnuz),
        torch.ones(1, 3).expand(4, 3),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_tensors(tensor: torch.Tensor) -> None:
    found = through_json({"a": tensor})["a"]

    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    assert torch.equal(found.to(wide), tensor.to(wide))


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.uint32), np.ones((2, 3))[:, ::2], np.float64([[1.5]])[0, 0:1]]
)
def test_arrays(array: Any) -> None:
    found = through_json([array])[0]

    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_tied_tensors_stay_one_and_are_stored_once() -> None:
    shared = torch.ones(3)
    encoded = encode({"embed": shared, "head": {"weight": shared}}, "model")

    found = decode(encoded.tree, encoded.tensors, "model.json")

    assert len(encoded.tensors) == 1
    assert found["embed"] is found["head"]["weight"]


def test_views_of_one_memory_stay_such() -> None:
    whole = torch.arange(24, dtype=torch.float32)
    state = {"whole": whole, "row": whole.view(4, 6)[1], "bits": whole[2:4].view(torch.int32)}

    encoded = encode(state, "state")
    found = decode(encoded.tree, encoded.tensors, "state.json")

    assert len(encoded.tensors) == 1
    assert all(torch.equal(found[name], state[name]) for name in state)
    found["whole"][7] = -1
    assert found["row"][1] == -1


def test_views_that_share_no_byte_are_stored_apart() -> None:
    whole = torch.arange(10)
    encoded = encode({"a": whole[:4], "b": whole[4:]}, "state")

    assert {tuple(t.shape) for t in encoded.tensors.values()} == {(4,), (6,)}


def test_parameters_stay_parameters() -> None:
    found = through_json([nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)])

    assert isinstance(found[0], nn.Parameter)
    assert not isinstance(found[1], nn.Parameter)
    assert found[1].requires_grad


def test_names_are_those_of_the_state_where_a_file_can_have_them() -> None:
    one, other, third = torch.ones(1), torch.ones(2), torch.ones(3)
    encoded = encode({"a": {"b": one}, "a.b": other, "größe": third}, "state")

    assert encoded.tensors["a.b"] is not None
    assert len(encoded.tensors) == 3
    assert all(name.isascii() for name in encoded.tensors)


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - as old code has it


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Pair(1, 2), r"state\['x'\]\[0\] \(.*Pair\) can't be saved"),
        (lambda: 1, r"state\['x'\]\[0\] \(function\)"),
        (object(), r"\(object\).*state_dict\(\) and load_state_dict\(\)"),
        (torch.ones(2).to_sparse(), r"no dense tensor"),
        (torch.empty(2, device="meta"), r"on meta"),
        (np.array(["a"]), r"NumPy's <U1"),
        (np.longdouble(1), r"NumPy's"),
        (10**2000, r"more than 4096 bits"),
    ],
)
def test_what_can_not_come_back_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(UnsavableStateError, match=message):
        encode({"x": [value]}, "state")


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)

    with pytest.raises(UnsavableStateError, match="contains itself"):
        encode(loop, "state")


@pytest.mark.parametrize(
    "tree",
    [{"$tensor": "a"}, {"$later": 1}, {"$tuple": 3}, {"$dict": [[1]]}, {"$dtype": "nn"}],
)
def test_what_was_never_written_is_refused(tree: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json holds what this release can't read"):
        decode(tree, {}, "state.json")


def test_no_tensor_is_copied() -> None:
    tensor = torch.ones(5)
    encoded: Encoded = encode([tensor], "state")

    assert encoded.tensors["0"].data_ptr() == tensor.data_ptr()


def optimizers() -> list[type[torch.optim.Optimizer]]:
    """Every optimizer of torch's that takes dense gradients without a closure."""
    left_out = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
    found = [getattr(torch.optim, name) for name in torch.optim.__all__ if name not in left_out]
    return [kind for kind in found if isinstance(kind, type)]


@pytest.mark.parametrize("kind", optimizers(), ids=lambda kind: kind.__name__)
def test_every_optimizer_goes_on_the_same(kind: Any) -> None:
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, kind(model.named_parameters(), lr=0.1)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        return model.weight.detach().clone()

    model, optimizer = made()
    step(model, optimizer)
    other, again = made()
    other.load_state_dict(through_json(model.state_dict()))
    again.load_state_dict(through_json(optimizer.state_dict()))

    assert all(torch.equal(step(model, optimizer), step(other, again)) for _ in range(2))


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o, s: s.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o, s: s.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o, s: s.StepLR(o, 2),
    "MultiStepLR": lambda o, s: s.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o, s: s.ConstantLR(o),
    "LinearLR": lambda o, s: s.LinearLR(o),
    "ExponentialLR": lambda o, s: s.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, s: s.PolynomialLR(o),
    "CosineAnnealingLR": lambda o, s: s.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o, s: s.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o, s: s.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o, s: s.OneCycleLR(o, 0.1, 20),
    "ReduceLROnPlateau": lambda o, s: s.ReduceLROnPlateau(o, patience=0),
    "ChainedScheduler": lambda o, s: s.ChainedScheduler([s.ConstantLR(o), s.ExponentialLR(o, 0.9)]),
    "SequentialLR": lambda o, s: s.SequentialLR(o, [s.ConstantLR(o), s.StepLR(o, 2)], [3]),
    "SWALR": lambda o, _: torch.optim.swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_every_scheduler_goes_on_the_same(name: str) -> None:
    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer, torch.optim.lr_scheduler)

    def step(optimizer: torch.optim.Optimizer, scheduler: Any) -> float:
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return float(optimizer.param_groups[0]["lr"])

    optimizer, scheduler = made()
    for _ in range(3):
        step(optimizer, scheduler)
    other, again = made()
    other.load_state_dict(through_json(optimizer.state_dict()))
    again.load_state_dict(through_json(scheduler.state_dict()))

    assert [step(optimizer, scheduler) for _ in range(4)] == [step(other, again) for _ in range(4)]
