"""Decode steps of several sequences at fixed addresses: as CUDA graphs on a GPU, plainly here."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from joining import load_ends

from splitlearn_core import SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.errors import StepGraphError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.step_graphs import StepGraphs

POINTS = [2, 4]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_each = pytest.mark.parametrize("device", ["cpu", GPU])
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}

Load = Callable[..., SplitModel]


@pytest.fixture
def load(make_checkpoint: Callable[..., Any]) -> Load:
    """Return a function that loads a Trunk."""

    def trunk(device: str = "cpu", dtype: str = "float32", kind: str = "llama") -> SplitModel:
        path = make_checkpoint(kind).path
        return load_component(path, "trunk", POINTS, device=device, dtype=dtype)

    return trunk


def hidden(part: SplitModel, *shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, part.hidden_size, generator=numbers).to(part.dtype)


def run(part: SplitModel, given: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.inference_mode():
        return HiddenState.of(part(given, past_key_values=cache)).tensor.cpu()


class Pairs:
    """Caches of sequences that step together, and beside each the cache of one that goes alone."""

    def __init__(self, part: SplitModel, graphs: StepGraphs, lengths: Sequence[int]) -> None:
        self.part, self.graphs = part, graphs
        self.caches = [graphs.new_cache() for _ in lengths]
        self.alone = [PartCache(part.config, part.spec) for _ in lengths]
        for number, length in enumerate(lengths):
            self.both(number, hidden(part, 1, length, seed=number))

    def both(self, number: int, given: torch.Tensor) -> None:
        run(self.part, given, self.caches[number])
        run(self.part, given, self.alone[number])

    def error(self, *numbers: int, seed: int = 0) -> float:
        """Let these sequences step together; return the largest relative error."""
        given = hidden(self.part, len(numbers), 1, seed=seed)
        found = self.graphs.step([self.caches[number] for number in numbers], given).cpu().double()
        wanted = torch.cat(
            [
                run(self.part, given[row : row + 1], self.alone[number])
                for row, number in enumerate(numbers)
            ]
        ).double()
        assert found.shape == given.shape
        return float((found - wanted).abs().max() / wanted.abs().max())


@on_each
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steps_together_are_those_of_each_alone(
    load: Load, device: str, dtype: str, kind: str
) -> None:
    part = load(device, dtype, kind)
    graphs = StepGraphs(part, sequences=6, positions=24)
    pairs = Pairs(part, graphs, [5, 1, 11])

    errors = [pairs.error(0, 1, 2, seed=n) for n in range(3)]
    errors += [pairs.error(2, seed=7), pairs.error(2, 0, seed=8)]  # others lie idle meanwhile
    pairs.both(1, hidden(part, 1, 4, seed=9))  # a piece of a prompt between two steps
    errors += [pairs.error(1, 0, 2, seed=n) for n in range(3)]

    assert max(errors) < TOLERANCES[dtype]
    assert [cache.length for cache in pairs.caches] == [cache.length for cache in pairs.alone]


@on_each
def test_position_ids_can_be_said(load: Load, device: str) -> None:
    part = load(device)
    pairs = Pairs(part, StepGraphs(part, 2, 16), [3, 6])
    given = hidden(part, 2, 1)
    said = torch.tensor([[1], [9]])

    found = pairs.graphs.step(pairs.caches, given, said).cpu()

    for row, cache in enumerate(pairs.alone):
        with torch.inference_mode():
            wanted = part(
                given[row : row + 1], position_ids=said[row : row + 1], past_key_values=cache
            )
        torch.testing.assert_close(found[row : row + 1], wanted.cpu(), rtol=1e-4, atol=1e-5)


@on_each
def test_a_sequence_that_went_back_goes_on_from_there(load: Load, device: str) -> None:
    part = load(device)
    pairs = Pairs(part, StepGraphs(part, 4, 24), [5, 9])
    assert pairs.error(0, 1) < 1e-5
    for cache in (pairs.caches[1], pairs.alone[1]):
        cache.crop(-4)

    assert pairs.graphs.takes(pairs.caches[1])
    assert pairs.error(0, 1, seed=1) < 1e-5
    assert [cache.length for cache in pairs.caches] == [7, 7]


@on_each
def test_a_copy_has_a_slot_from_its_first_forward(load: Load, device: str) -> None:
    part = load(device)
    graphs = StepGraphs(part, 2, 24)
    pairs = Pairs(part, graphs, [5])
    pairs.caches.append(pairs.caches[0].copy())
    pairs.alone.append(pairs.alone[0].copy())

    assert not graphs.takes(pairs.caches[1])
    pairs.both(1, hidden(part, 1, 1, seed=3))
    assert graphs.takes(pairs.caches[1])
    assert max(pairs.error(0, 1, seed=n) for n in range(3)) < 1e-5


def test_one_that_outgrows_its_slot_goes_on_by_itself(load: Load) -> None:
    part = load()
    graphs = StepGraphs(part, 2, 8)
    pairs = Pairs(part, graphs, [6])
    assert pairs.error(0) < 1e-5
    assert pairs.error(0, seed=1) < 1e-5

    assert not graphs.takes(pairs.caches[0])
    given = hidden(part, 1, 1, seed=4)
    for _ in range(2):
        torch.testing.assert_close(
            run(part, given, pairs.caches[0]), run(part, given, pairs.alone[0])
        )
        assert not graphs.takes(pairs.caches[0])


def test_one_that_outgrew_its_slot_and_went_back_steps_by_itself(load: Load) -> None:
    part = load()
    graphs = StepGraphs(part, 2, 8)
    pairs = Pairs(part, graphs, [6])
    pairs.both(0, hidden(part, 1, 4, seed=1))
    for cache in (pairs.caches[0], pairs.alone[0]):
        cache.crop(-6)
    pairs.both(0, hidden(part, 1, 2, seed=2))

    assert pairs.caches[0].length == 6
    assert not graphs.takes(pairs.caches[0])


def test_what_a_slot_was_left_with_spoils_nobody_else(load: Load) -> None:
    part = load()
    graphs = StepGraphs(part, 1, 16)
    left = graphs.new_cache()
    run(part, hidden(part, 1, 9), left)
    for layer in left.layers[POINTS[0] : POINTS[1]]:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.inf)
    del left, layer

    pairs = Pairs(part, graphs, [3])
    assert graphs.takes(pairs.caches[0])
    assert pairs.error(0) < 1e-5


class NoMemory:
    """Stands for CUDA without memory for a graph: what ends a recording says that it failed."""

    def record(self, forward: Callable[[], torch.Tensor]) -> Any:
        forward()
        earlier = torch.OutOfMemoryError("20 MiB more, and there are 3")
        raise RuntimeError("operation failed due to a previous error during capture") from earlier


def test_where_a_graph_can_not_be_recorded_no_other_is_tried(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load()
    pairs = Pairs(part, graphs := StepGraphs(part, 4, 16), [5, 3, 2])
    assert pairs.error(0) < 1e-5
    monkeypatch.setattr(graphs, "_recorder", NoMemory())
    assert pairs.error(0, seed=1) < 1e-5  # recorded before

    with pytest.raises(RuntimeError, match="previous error"):
        graphs.step(pairs.caches, hidden(part, 3, 1))
    assert not any(map(graphs.takes, pairs.caches))
    assert [cache.length for cache in pairs.caches] == [7, 3, 2]


def test_a_load_says_why_a_graph_could_not_be_recorded(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load()

    def made(*_: Any) -> Any:
        return NoMemory().record(lambda: torch.zeros(1))

    monkeypatch.setattr("splitlearn_core.step_graphs._Step", made)
    with pytest.raises(StepGraphError, match=r"can't be CUDA graphs: .*20 MiB more"):
        StepGraphs(part, 4, 16)


@pytest.mark.gpu(2)
def test_each_of_two_gpus_records_its_own(load: Load) -> None:
    parts = [load(f"cuda:{number}") for number in range(2)]
    all_pairs = [Pairs(part, StepGraphs(part, 4, 16), [5, 3]) for part in parts]
    for seed in range(3):
        for pairs in all_pairs:
            assert pairs.error(0, 1, seed=seed) < 1e-5


def test_slots_are_given_to_those_that_come_and_back_by_those_that_go(load: Load) -> None:
    part = load()
    graphs = StepGraphs(part, 2, 8)
    pairs = Pairs(part, graphs, [2, 3, 4])
    assert [graphs.takes(cache) for cache in pairs.caches] == [True, True, False]
    torch.testing.assert_close(
        run(part, hidden(part, 1, 1), pairs.caches[2]),
        run(part, hidden(part, 1, 1), pairs.alone[2]),
    )

    pairs.caches[0].reset()
    newcomer = graphs.new_cache()
    run(part, hidden(part, 1, 2), newcomer)
    assert graphs.takes(newcomer)
    del newcomer
    another = graphs.new_cache()
    run(part, hidden(part, 1, 2), another)
    assert graphs.takes(another)
    run(part, hidden(part, 1, 2), pairs.caches[0])
    assert not graphs.takes(pairs.caches[0])
    assert pairs.error(1) < 1e-5


def test_what_is_of_several_rows_or_of_another_part_is_not_taken(load: Load) -> None:
    part, other = load(), load()
    graphs, others = StepGraphs(part, 2, 8), StepGraphs(other, 2, 8)
    rows, foreign, empty = graphs.new_cache(), others.new_cache(), graphs.new_cache()
    run(part, hidden(part, 2, 3), rows)
    run(other, hidden(other, 1, 3), foreign)

    grown = graphs.new_cache()
    run(part, hidden(part, 1, 3), grown)
    assert graphs.takes(grown)
    grown.batch_repeat_interleave(2)

    assert not any(map(graphs.takes, (rows, foreign, empty, grown, object())))
    with pytest.raises(ValueError, match="has a slot"):
        graphs.step([foreign], hidden(part, 1, 1))


def test_caches_are_as_they_were_if_a_step_fails(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load()
    pairs = Pairs(part, StepGraphs(part, 2, 16), [5, 3])
    assert pairs.error(0, 1) < 1e-5

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more memory there")

    with monkeypatch.context() as patch:
        patch.setattr(part.model, "forward", fails)
        with pytest.raises(RuntimeError, match="no more memory"):
            pairs.graphs.step(pairs.caches, hidden(part, 2, 1))

    assert [cache.length for cache in pairs.caches] == [6, 4]
    assert pairs.error(1, 0, seed=5) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma2", "gemma2 can't be CUDA graphs: its layers keep something else"),
        ("mamba", "mamba can't be CUDA graphs: its layers keep something else"),
        ("gemma3n_text", "more than the hidden state goes from part to part"),
        ("gptj", r"gptj can't be CUDA graphs: a first step differs by 0\.\d+"),
        ("bloom", "bloom can't be CUDA graphs: ValueError"),
    ],
)
def test_a_part_whose_steps_can_not_be_graphs_is_refused(model_type: str, said: str) -> None:
    with pytest.raises(StepGraphError, match=said):
        load_ends(model_type)[1].graph_steps(2, 8)


def test_only_a_trunk_has_steps() -> None:
    with pytest.raises(StepGraphError, match="for a Trunk, and this is bottom"):
        load_ends("llama")[0].graph_steps(2, 8)


@pytest.mark.parametrize(
    ("sequences", "positions", "said"),
    [(0, 8, "found 0 and 8"), (2, 0, "found 2 and 0"), (2, 4, "6 positions or more")],
)
def test_sizes_that_are_too_small(load: Load, sequences: int, positions: int, said: str) -> None:
    with pytest.raises(StepGraphError, match=said):
        load().graph_steps(sequences, positions)


def test_a_part_with_graphs_makes_caches_for_them_and_stays_where_it_is(load: Load) -> None:
    part = load()
    part.graph_steps(2, 8)
    assert part.step_graphs is not None
    cache = part.new_cache()
    run(part, hidden(part, 1, 3), cache)
    assert part.step_graphs.takes(cache)

    with pytest.raises(StepGraphError, match="move or cast it before"):
        part.to(torch.bfloat16)
    assert part.dtype == torch.float32
    other = copy.deepcopy(part)
    assert other.step_graphs is None
    assert copy.deepcopy(cache).length == 3


def test_a_part_that_is_given_up_takes_its_graphs_with_it(load: Load) -> None:
    part = load()
    part.graph_steps(2, 8)
    seen = weakref.ref(part)
    graphs = part.step_graphs
    assert graphs is not None
    cache = part.new_cache()
    run(part, hidden(part, 1, 3), cache)

    del part
    assert seen() is None
    with pytest.raises(RuntimeError, match="is gone"):
        graphs.step([cache], torch.zeros(1, 1, 32))


def test_memory_is_what_was_estimated_and_each_cache_has_its_share(
    load: Load, make_checkpoint: Callable[..., Any]
) -> None:
    part = load()
    part.graph_steps(sequences=3, positions=20)
    cache = part.new_cache()
    run(part, hidden(part, 1, 3), cache)

    path = make_checkpoint("llama").path
    plain = estimate_component(path, "trunk", POINTS)
    found = estimate_component(path, "trunk", POINTS, cached_positions=3 * 21)
    width = part.kv_bytes_per_position
    assert width is not None
    assert found.steady_bytes - plain.steady_bytes == 3 * 21 * width
    assert found.peak_bytes - plain.peak_bytes == 3 * 21 * width
    assert isinstance(cache, PartCache)
    assert cache.allocated_nbytes == 20 * width
    assert cache.nbytes == 3 * width
    assert part.resident_bytes() - load().resident_bytes() == 3 * 21 * width
