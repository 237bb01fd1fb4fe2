"""A slice of the failover campaign; `scripts/soak failover` is the whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failover.campaign import Campaign
from failover.places import Places
from transformers import StoppingCriteria, StoppingCriteriaList

from splitlearn_core.quickstart import load_full_model, load_tokenizer
from splitlearn_manager import ModelConfig
from splitlearn_manager.client.pipeline import load_pipeline

SEED = 4
TRIALS = 8  # each event once, and a kill more


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with Places(2, tmp_path_factory.mktemp("failover") / "daemons.log") as places:
        yield places


def test_tokens_are_the_unsplit_models_whatever_becomes_of_the_server(
    places: Places, tmp_path: Path
) -> None:
    campaign = Campaign(tmp_path, SEED)

    wrong = [f"{what}: {wrong}" for what, wrong in campaign.run_at(places, TRIALS) if wrong]

    assert not wrong, "\n".join([*wrong, str(campaign.report)])
    assert campaign.report.healed > 0
    assert campaign.report.positions > 0


class KillsAt(StoppingCriteria):
    """Kills a daemon when there are so many tokens; stops nothing."""

    def __init__(self, places: Places, tokens: int) -> None:
        self._places, self._tokens = places, tokens

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Look how many there are."""
        if input_ids.shape[1] == self._tokens:
            self._places.kill(0)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_a_pipeline_goes_on_at_its_next_address_and_says_where(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    places.start(0)
    options = {"split_points": [2, 6], "trunk": places.urls, "retry": {"total": 30}}
    config = ModelConfig(
        "chat", "builtin:demo", model_type="pipeline", dtype="float32", config=options
    )
    pipeline = load_pipeline(config)
    ids = pipeline.tokenizer("The function returns", return_tensors="pt").input_ids
    whole, _ = load_full_model("builtin:demo", dtype="float32")
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    try:
        kill = StoppingCriteriaList([KillsAt(places, ids.shape[1] + 5)])
        found = pipeline.model.generate(ids, stopping_criteria=kill, **how)
    finally:
        pipeline.close()

    assert torch.equal(found, whole.generate(ids, **how))
    assert pipeline.trunks[0].url == places.urls[1]
    assert f"connection to {places.urls[0]} lost; going on at {places.urls[1]}" in caplog.text


def test_the_command_goes_on_too_at_the_restarted_server(places: Places) -> None:
    places.start(0)
    url, prompt = places.urls[0], "The function returns"
    arguments = ["--trunk", url, "--prompt", prompt, "--max-new-tokens", "40"]
    with subprocess.Popen(
        [sys.executable, "-m", "splitlearn_manager", "generate", "builtin:demo", *arguments],
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) <= len(prompt):
            begun += process.stdout.read(100)
        process.send_signal(signal.SIGSTOP)  # so that it can't end before its server does
        places.kill(0)
        places.start(0)
        process.send_signal(signal.SIGCONT)
        rest, told = process.communicate()

    whole, _ = load_full_model("builtin:demo", dtype="float32")
    tokenizer = load_tokenizer("builtin:demo")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = whole.generate(ids, max_new_tokens=40, do_sample=False)
    assert process.returncode == 0, told.decode()
    expected = tokenizer.decode(made[0], skip_special_tokens=True)
    assert (begun + rest).decode().strip() == expected.strip()
    assert f"{url} lost; going on at {url}" in told.decode()
