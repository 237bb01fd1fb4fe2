"""A seeded slice of the fuzz of frames; all of it is `scripts/soak frames`."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
import torch
from frame_fuzz.campaign import Conversation, Witness, fuzz
from raw_websocket import PeerGone

from splitlearn_manager.serving.wire import Frame, Kind

FRAMES = 600


def test_wrong_frames_are_refused_and_disturb_nobody() -> None:
    seen: Counter[str] = Counter()

    found = list(fuzz(0, FRAMES, seen))

    assert not [(what, wrong) for what, wrong in found if wrong]
    assert len(found) >= FRAMES
    # it would be no fuzz if little of what can happen did
    assert {"OPENED", "RESULT", "DONE", "CLOSED", "closed with 1002", "closed with 1003"} <= {*seen}
    refusals = {"bad_frame", "bad_step", "bad_open", "bad_position", "unknown_session", "too_long"}
    assert refusals | {"client_limit", "roll_back"} <= {*seen}
    assert seen["RESULT"] > FRAMES // 20


class Said:
    """A server that says what the test wants it to."""

    def __init__(self, *frames: Frame | Exception) -> None:
        self.frames = list(frames)

    def send(self, *frames: bytes) -> None:
        del frames

    async def receive(self) -> Frame:
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        return frame

    async def ask(self, frame: Frame) -> Frame:
        del frame
        return await self.receive()


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ([Frame(Kind.ERROR, 9)], "nobody asked for"),
        ([Frame(Kind.ERROR, 1, info={"code": "internal"})], "internal"),
        ([Frame(Kind.STEP, 1)], "the server sent STEP"),
        ([PeerGone(1011)], "the connection ended with 1011"),
        ([PeerGone(1002)], "without need"),
        ([PeerGone(None)], "the connection ended with None"),
        ([TimeoutError()], "no answer"),
    ],
)
def test_the_judge_sees_what_it_is_to_see(said: list[Any], wrong: str) -> None:
    socket: Any = Said(*said, PeerGone(1000))
    talk = Conversation(socket, random.Random(0), Counter())  # noqa: S311 - no secret
    talk.open[1] += 1

    asyncio.run(talk.settle())

    assert wrong in talk.wrong[0]


def test_the_witness_sees_wrong_numbers() -> None:
    given = torch.ones(1, 1, 64)
    opened, result = Frame(Kind.OPENED, 1, 5), Frame(Kind.ERROR, 2, info={"code": "bad_step"})
    socket: Any = Said(opened, result)
    witness = Witness(socket, [given], [given], exact=True)

    assert "the witness gets ERROR" in asyncio.run(witness.look())
