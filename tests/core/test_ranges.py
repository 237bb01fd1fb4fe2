"""Planning of range requests, and the layout of a part's file: arithmetic, no network."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from splitlearn_core.headers import TensorInfo, parse_header, read_header
from splitlearn_core.loading.ranges import (
    Located,
    Piece,
    lay_out,
    merged,
    plan_requests,
    without,
)

lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=30)


def pieces_of(gaps_and_lengths: list[tuple[int, int]], file: str = "a") -> list[Piece]:
    """Return pieces with the given gap before each, one after the other in the part's file."""
    pieces: list[Piece] = []
    position, target = 100, 16
    for number, (gap, length) in enumerate(gaps_and_lengths):
        start = position + gap
        pieces.append(Piece(f"t{number}", file, start, start + length, target))
        position, target = start + length, target + length
    return pieces


@given(lengths, st.integers(1, 90), st.integers(0, 40), st.floats(0, 0.5), st.randoms())
def test_requests_bring_every_byte_once_to_its_place(
    sizes: list[tuple[int, int]],
    max_bytes: int,
    max_gap: int,
    share: float,
    order: random.Random,
) -> None:
    pieces = pieces_of(sizes) + pieces_of(sizes[:3], "b")
    order.shuffle(pieces)

    requests = plan_requests(pieces, max_bytes, max_gap, share)

    wanted = {(p.file, p.start + i, p.target + i) for p in pieces for i in range(p.end - p.start)}
    brought = [
        (request.file, piece.start + i, piece.target + i)
        for request in requests
        for piece in request.kept(request.start, request.end)
        for i in range(piece.end - piece.start)
    ]
    assert len(brought) == len(set(brought))
    assert set(brought) == wanted
    assert all(request.end - request.start <= max_bytes for request in requests)
    asked = sum(request.end - request.start for request in requests)
    assert asked - len(wanted) <= share * len(wanted)


def test_neighbours_are_one_request() -> None:
    requests = plan_requests(pieces_of([(0, 10)] * 20), max_bytes=1000)

    assert [(request.start, request.end) for request in requests] == [(100, 300)]


def test_a_short_gap_is_fetched_where_it_costs_little() -> None:
    apart = pieces_of([(0, 1000), (4, 1000), (4000, 1000)])

    requests = plan_requests(apart, max_bytes=10**6, max_gap=100, gap_share=0.01)

    assert [request.wanted_bytes for request in requests] == [2000, 1000]
    assert [request.end - request.start for request in requests] == [2004, 1000]


def test_a_run_is_cut_into_equal_requests() -> None:
    requests = plan_requests(pieces_of([(0, 700), (0, 300)]), max_bytes=300)

    assert [request.end - request.start for request in requests] == [250] * 4


def test_pieces_of_a_range_are_found() -> None:
    (request,) = plan_requests(pieces_of([(0, 10), (0, 10), (0, 10)]), max_bytes=100)

    kept = [(p.tensor, p.start, p.end, p.target) for p in request.kept(108, 121)]

    assert kept == [("t0", 108, 110, 24), ("t1", 110, 120, 26), ("t2", 120, 121, 36)]


@given(lengths, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=12))
def test_what_is_there_is_left_out(
    sizes: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> None:
    pieces = pieces_of(sizes)
    done = [(start, start + length) for start, length in spans]

    left = without(pieces, done)

    there = {i for start, end in done for i in range(start, end)}
    targets = {i for piece in pieces for i in range(*piece.target_span)}
    assert {i for piece in left for i in range(*piece.target_span)} == targets - there
    origins = {piece.tensor: piece for piece in pieces}
    for piece in left:
        origin = origins[piece.tensor]
        assert piece.target - piece.start == origin.target - origin.start


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
def test_merged_spans_hold_the_same_bytes(spans: list[tuple[int, int]]) -> None:
    result = merged(spans)

    assert {i for s in result for i in range(*s)} == {i for s in spans for i in range(*s)}
    assert all(a[1] < b[0] for a, b in pairwise(result))


@pytest.mark.parametrize("odd", [1, 3])
def test_a_part_of_many_dtypes_is_a_sound_aligned_file(tmp_path: Path, odd: int) -> None:
    tensors = {
        "bytes": Located("a", TensorInfo("U8", (odd,), 1000, 1000 + odd)),
        "half": Located("a", TensorInfo("BF16", (odd,), 100, 100 + 2 * odd)),
        "wide": Located("b", TensorInfo("I64", (2,), 500, 516)),
        "none": Located("b", TensorInfo("F32", (0, 4), 600, 600)),
        "single": Located("b", TensorInfo("F32", (odd,), 516, 516 + 4 * odd)),
    }

    layout = lay_out(tensors, {"format": "pt"})

    content = bytearray(layout.size)
    content[: len(layout.prefix)] = layout.prefix
    infos = parse_header(layout.prefix[8:], layout.size, "it")
    for piece in layout.pieces:
        info = infos[piece.tensor]
        assert piece.target_span == (info.start, info.end)
        content[info.start : info.end] = bytes([piece.start % 251]) * info.nbytes
    path = tmp_path / "part.safetensors"
    path.write_bytes(content)
    assert read_header(path).keys() == tensors.keys()
    with safe_open(path, framework="pt") as file:
        for name, located in tensors.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == located.info.shape
            assert tensor.data_ptr() % tensor.itemsize == 0
        assert file.get_tensor("wide").view(torch.uint8).unique().tolist() == [500 % 251]
