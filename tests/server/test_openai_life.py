"""What becomes of requests for text when clients, models and daemons come and go."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from gateways import daemon_of, pipeline_config, trunk_config, whole_config
from serving_fakes import ask, daemon_in_thread

from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager import (
    AsyncModelManager,
    ModelConfig,
    ModelLoader,
    ResourceManager,
    ServerConfig,
)
from splitlearn_manager.config import DaemonConfig

PROMPT = "The function returns"
CHAT: Any = [{"role": "user", "content": "Hello"}]
SOON = {"attempts": 2, "total": 1.0}
"""When it is given up to go on without a Trunk."""

LONG: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 480,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": "any", "max_retries": 0, **options})


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is true that other threads bring about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def gauge(url: str, name: str) -> float:
    """Return the sum of a metric's series."""
    lines = ask(url, "/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"splitlearn_{name}{{"))


# --- Who may ask ---------------------------------------------------------------------------


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", "secret")
    with daemon_of(token_env="GATEWAY_TOKEN") as daemon:  # noqa: S106 - a variable's name
        with client_of(daemon.url) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert caught.value.code == "invalid_api_key"
        with client_of(daemon.url, api_key="secret") as client:
            assert client.models.list().data == []


def test_another_host_and_another_origin_are_refused_in_the_form_of_the_protocol() -> None:
    with daemon_of() as daemon:
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            answer = ask(daemon.url, "/v1/models", headers=headers)
            assert answer.status == 403
            assert json.loads(answer.body)["error"]["code"] == "forbidden"


def test_a_body_that_is_too_long() -> None:
    with daemon_of(max_frame_bytes=65536) as daemon, client_of(daemon.url) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="any", prompt="x" * 70_000)
        assert (caught.value.status_code, caught.value.code) == (413, "too_large")


# --- While a model loads -------------------------------------------------------------------


class _GatedLoader:
    """Loads when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def estimate(self, config: ModelConfig) -> Any:
        return ModelLoader.estimate(config)

    def load_from_config(self, config: ModelConfig, progress: Any = None) -> Any:
        assert self.gate.wait(60)
        return ModelLoader.load_from_config(config, progress)


@contextmanager
def counting(url: str, **options: Any) -> Iterator[tuple[openai.OpenAI, list[int]]]:
    """Yield a client, and the statuses of all answers that it gets."""
    statuses: list[int] = []
    probe = openai.DefaultHttpxClient(
        event_hooks={"response": [lambda response: statuses.append(response.status_code)]}
    )
    with client_of(url, http_client=probe, **options) as client:
        yield client, statuses


def test_a_client_waits_while_a_model_loads() -> None:
    loader = _GatedLoader()
    manager = AsyncModelManager(loader=loader, single_threaded=False)
    config = DaemonConfig(
        server=ServerConfig(port=0, management=True),
        models=(ModelConfig("m", "builtin:demo", dtype="float32", preload=False),),
    )
    with daemon_in_thread(config, manager=manager) as daemon:
        with counting(daemon.url, max_retries=2) as (client, statuses):
            with pytest.raises(openai.InternalServerError, match="not loaded") as caught:
                client.completions.create(model="m", prompt="x")
            assert caught.value.code == "model_not_loaded"
            assert statuses == [503]  # asking again would not load it

        path = "/v2/repository/models/m/load"
        assert ask(daemon.url, path, "POST", headers={"Prefer": "respond-async"}).status == 202
        with counting(daemon.url) as (client, statuses):
            with pytest.raises(openai.InternalServerError, match="is loading") as caught:
                client.completions.create(model="m", prompt="x")
            assert caught.value.code == "model_loading"
            assert caught.value.response.headers["retry-after"] == "1"

        with counting(daemon.url, max_retries=10) as (client, statuses):
            opener = threading.Thread(
                target=lambda: (until(lambda: bool(statuses)), loader.gate.set())
            )
            opener.start()
            answer = client.completions.create(model="m", prompt="x", max_tokens=2)
            opener.join()
            assert answer.choices[0].finish_reason
            assert statuses[0] == 503
            assert statuses[-1] == 200


def test_a_model_that_failed_to_load_is_not_asked_for_again(tmp_path: Path) -> None:
    broken = ModelConfig("broken", str(tmp_path), dtype="float32", preload=False)
    with daemon_of(broken, management=True) as daemon:
        ask(daemon.url, "/v2/repository/models/broken/load", "POST")
        with (
            counting(daemon.url, max_retries=2) as (client, statuses),
            pytest.raises(openai.InternalServerError, match="failed to load"),
        ):
            client.completions.create(model="broken", prompt="x")
        assert statuses == [503]


# --- When there is much to do --------------------------------------------------------------


def test_one_too_many_is_refused_and_gets_its_turn_when_it_asks_again() -> None:
    with (
        daemon_of(whole_config("m"), max_batch_size=1, max_queue_size=1) as daemon,
        client_of(daemon.url) as client,
    ):
        running = client.completions.create(model="m", stream=True, **LONG)
        next(iter(running))
        answers: list[Any] = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                client.completions.create(model="m", prompt=PROMPT, max_tokens=2)
            )
        )
        waiting.start()
        until(lambda: gauge(daemon.url, "generation_requests_waiting") == 1)

        with pytest.raises(openai.RateLimitError, match="wait already") as caught:
            client.completions.create(model="m", prompt=PROMPT)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"

        with counting(daemon.url, max_retries=10) as (patient, statuses):
            closer = threading.Thread(
                target=lambda: (until(lambda: bool(statuses)), running.close())
            )
            closer.start()
            assert patient.completions.create(model="m", prompt=PROMPT, max_tokens=2).choices
            closer.join()
            assert statuses[0] == 429
        waiting.join()
        assert len(answers) == 1


def test_memory_for_caches_is_reserved_and_given_back() -> None:
    model = whole_config("m")
    with daemon_of(model) as daemon, client_of(daemon.url) as client:
        with client.completions.create(model="m", stream=True, **LONG) as running:
            next(iter(running))
            # 8 layers, keys and values, 2 heads of 32, float32; blocks of 64 positions
            assert gauge(daemon.url, "model_kv_cache_bytes") == 8 * 2 * 2 * 32 * 4 * 512
        until(lambda: gauge(daemon.url, "model_kv_cache_bytes") == 0)


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    limit = ModelLoader.estimate(whole_config("m")).peak_bytes + (2 << 20)
    manager = AsyncModelManager(ResourceManager(memory_limit=limit), single_threaded=False)
    config = DaemonConfig(server=ServerConfig(port=0), models=(whole_config("m"),))
    with daemon_in_thread(config, manager=manager) as daemon, client_of(daemon.url) as client:
        with pytest.raises(openai.InternalServerError, match="lower max_tokens") as caught:
            client.completions.create(model="m", n=32, **LONG)  # 2 MiB each
        assert caught.value.code == "no_memory"
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=4)
        assert answer.choices


# --- Clients that go away ------------------------------------------------------------------


def test_a_client_that_goes_away_has_nothing_more_made_and_nothing_held() -> None:
    with daemon_of(trunk_config()) as trunk, daemon_of(pipeline_config(trunk.url)) as gateway:
        with client_of(gateway.url) as client:
            stream = client.completions.create(model="demo", stream=True, n=2, **LONG)
            next(iter(stream))
            assert gauge(trunk.url, "sessions_open") == 2
            stream.close()
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(model="demo", timeout=0.5, **LONG)

        until(lambda: gauge(gateway.url, "generation_requests_running") == 0)
        until(lambda: gauge(trunk.url, "sessions_open") == 0)
        until(lambda: gauge(gateway.url, "model_kv_cache_bytes") == 0)
        text = ask(gateway.url, "/metrics").body.decode()
        assert 'generation_requests_total{code="cancelled",model="demo"} 2.0' in text
        made = gauge(gateway.url, "generation_tokens_total")
        assert made < 3 * 480


# --- Daemons that end ----------------------------------------------------------------------


def test_a_stream_in_flight_is_finished_before_the_daemon_ends() -> None:
    with daemon_of(whole_config("m"), drain_timeout=60) as daemon, client_of(daemon.url) as client:
        stream = client.completions.create(
            model="m", prompt=PROMPT, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [next(iter(stream))]
        daemon.stop()
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            client.completions.create(model="m", prompt=PROMPT)


def test_a_stream_that_can_not_be_finished_ends_with_an_error() -> None:
    with (
        daemon_of(whole_config("m"), drain_timeout=0.3) as daemon,
        client_of(daemon.url) as client,
    ):
        stream = client.completions.create(model="m", stream=True, n=8, **LONG)
        next(iter(stream))
        daemon.stop()
        with pytest.raises(openai.APIError, match="shutting down") as caught:
            list(stream)
        assert caught.value.code == "draining"


def test_an_unload_ends_what_is_left_at_its_deadline() -> None:
    with (
        daemon_of(whole_config("m"), management=True) as daemon,
        client_of(daemon.url) as client,
    ):
        stream = client.completions.create(model="m", stream=True, n=8, **LONG)
        next(iter(stream))
        body = json.dumps({"parameters": {"drain_timeout": 0}}).encode()
        ask(daemon.url, "/v2/repository/models/m/unload", "POST", body)
        with pytest.raises(openai.APIError, match="being unloaded"):
            list(stream)


def test_a_trunk_that_goes_away_ends_its_own_requests_alone() -> None:
    with (
        daemon_of(trunk_config()) as trunk,
        daemon_of(pipeline_config(trunk.url, retry=SOON), whole_config("whole")) as gateway,
        client_of(gateway.url) as client,
    ):
        stream = client.completions.create(model="demo", stream=True, **LONG)
        other = client.completions.create(model="whole", stream=True, **{**LONG, "max_tokens": 100})
        next(iter(stream))
        next(iter(other))
        trunk.stop()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "trunk_unavailable"
        pieces = list(other)
        assert pieces[-1].choices[0].finish_reason == "length"

        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="demo", prompt=PROMPT)
        assert refused.value.code == "trunk_unavailable"


# --- Chat templates ------------------------------------------------------------------------


def test_a_template_of_the_configuration_goes_before_the_tokenizers(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    model = whole_config("m", chat_template=str(template))
    with daemon_of(model) as daemon, client_of(daemon.url) as client:
        chat = client.chat.completions.create(model="m", messages=CHAT, max_tokens=6, temperature=0)
        plain = client.completions.create(
            model="m",
            prompt=client_tokens(model, "user: Hello\n"),
            max_tokens=6,
            temperature=0,
        )
        assert chat.choices[0].message.content == plain.choices[0].text


def client_tokens(config: ModelConfig, text: str) -> list[int]:
    tokenizer = load_tokenizer(config.model_path)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_a_template_runs_in_a_sandbox(tmp_path: Path, template: str) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    with daemon_of(whole_config("m", chat_template=str(file))) as daemon:
        with client_of(daemon.url) as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=CHAT)
        assert caught.value.param == "messages"
