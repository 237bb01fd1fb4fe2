"""What all tests share: the event loops of async tests, and a tiny model."""

from __future__ import annotations

import gc
import logging
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

# In debug mode event loops warn of every step that took long.  On a busy machine any may, and tests
# look at what was logged last; a loop that is really blocked is for `lifecycle_storm.watchdog`.
logging.getLogger("asyncio").addFilter(lambda record: not record.msg.startswith("Executing "))

# How long examples take, or are in the making, says how busy the machine is.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("any-machine", deadline=None, suppress_health_check=_SLOW)
settings.load_profile("any-machine")

# What a shell starts in the background ignores SIGINT, and so does all that this starts in turn;
# some tests interrupt what they have started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Let Python's cycle collector pass over what is here to stay: torch, transformers, the tests.

    Unloads and many tests end in a collection, and each looked through 400,000 objects.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu`, or `gpu(2)`, where there are not so many."""
    for mark in item.iter_markers("gpu"):
        import torch  # noqa: PLC0415 - most tests do without

        wanted, found = mark.args[0] if mark.args else 1, torch.cuda.device_count()
        if found < wanted:
            pytest.skip(f"needs {wanted} CUDA device(s), and this machine has {found}")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"debug": True, "use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Run a test marked `anyio` on asyncio's own loop and on uvloop, in debug mode."""
    return request.param


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Llama: 6 layers, hidden size 32, untied, float32."""
    import torch  # noqa: PLC0415 - most tests do without
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
