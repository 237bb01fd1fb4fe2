"""A gateway and a Trunk in processes of their own: OpenAI's client, lm-eval, and a Trunk killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import openai
import pytest
import torch
import yaml
from gateways import CUTS, DEMO, Unsplit

COMMAND = [sys.executable, "-m", "splitlearn_manager", "serve"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPTS = ["The function returns", "def main(", "Hello", "import os\n"]
CHAT: Any = [{"role": "user", "content": "Hello"}]
LM_EVAL = Path(__file__).parents[1] / "support" / "lm_eval_child.py"


class Process:
    """A daemon in a process of its own."""

    def __init__(
        self, folder: Path, name: str, models: list[dict[str, Any]], port: int = 0
    ) -> None:
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"models": models}))
        self.process = subprocess.Popen(
            [*COMMAND, "--config", str(config), "--port", str(port)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        for line in self.process.stdout or ():
            if match := re.search(r"listening on (\S+)", line):
                self.url = match.group(1)
            if "ready" in line:
                break

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, also where a test has failed."""
        if self.process.poll() is None:
            self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def trunk_model() -> dict[str, Any]:
    part = {"component": "trunk", "split_points": CUTS}
    return {"model_id": "trunk", "model_path": DEMO, "dtype": "float32", "config": part}


def gateway_models(url: str) -> list[dict[str, Any]]:
    options = {"split_points": CUTS, "trunk": url, "trunk_model_id": "trunk"}
    pipeline = {"model_id": "demo", "model_path": DEMO, "model_type": "pipeline"}
    whole = {"model_id": "whole", "model_path": DEMO, "config": {"component": "full"}}
    return [
        {**pipeline, "dtype": "float32", "config": options},
        {**whole, "dtype": "float32"},
    ]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("gateway")
    with (
        Process(folder, "trunk", [trunk_model()]) as trunk,
        Process(folder, "gateway", gateway_models(trunk.url)) as home,
    ):
        yield home.url
        assert home.end() == 0
        assert trunk.end() == 0


@pytest.fixture(scope="module")
def unsplit() -> Unsplit:
    torch.set_num_threads(1)
    return Unsplit()


def test_chat_and_completions_with_all_that_a_client_may_ask_for(
    gateway: str, unsplit: Unsplit
) -> None:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["demo", "whole"]
        batch = client.completions.create(
            model="demo", prompt=PROMPTS, max_tokens=8, temperature=0, echo=True, logprobs=2
        )
        assert [choice.text for choice in batch.choices] == [
            prompt + unsplit.text(prompt, 8) for prompt in PROMPTS
        ]
        drawn: list[Any] = [
            client.completions.create(
                model=model, prompt=PROMPTS[0], max_tokens=8, n=3, seed=5, stop=["zzz"]
            )
            for model in ("demo", "demo", "whole")
        ]
        texts = [[choice.text for choice in one.choices] for one in drawn]
        assert texts[0] == texts[1] == texts[2]
        stream = client.chat.completions.create(
            model="demo", messages=CHAT, max_tokens=8, temperature=0, stream=True
        )
        whole = client.chat.completions.create(
            model="whole", messages=CHAT, max_tokens=8, temperature=0
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nothing", prompt="x")


def test_many_clients_at_once(gateway: str, unsplit: Unsplit) -> None:
    prompts = [f"{prompt} {number}" for number in range(5) for prompt in PROMPTS]

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key="any") as client:

            async def one(number: int, prompt: str) -> str:
                options: dict[str, Any] = {"model": "demo", "prompt": prompt, "temperature": 0}
                if number % 2:
                    answer = await client.completions.create(**options, max_tokens=6)
                    return answer.choices[0].text
                stream = await client.completions.create(**options, max_tokens=6, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(*item) for item in enumerate(prompts)))

    assert asyncio.run(run()) == [unsplit.text(prompt, 6) for prompt in prompts]


# --- lm-eval -------------------------------------------------------------------------------

CHOICES = {
    "task": "choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1},
}
WRITING = {
    "task": "writing",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
    "metadata": {"version": 1},
}
DOCUMENTS = [
    ("The function returns", [" a list", " the string", " zzz"], 0),
    ("import", [" os", " the", " (("], 0),
    ("def main(", ["self)", " of the", "args):"], 2),
    ("A list of the", [" names", " ]", " function"], 0),
    ("Return the value of", [" the", " import", " ==="], 0),
    ("If the argument is", [" not", " class", " a string"], 2),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two tasks over a dataset in a JSON file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        json.dumps({"question": question, "choices": choices, "label": label})
        for question, choices, label in DOCUMENTS
    ]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    for task in (CHOICES, WRITING):
        where = {"dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **where}))
    return folder


def evaluated(tasks: Path, models: list[tuple[str, str]]) -> list[Any]:
    """Run lm-eval for several models, without network; return what it found for each."""
    environment = {
        **ENVIRONMENT,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tasks / "home"),
        "OPENAI_API_KEY": "any",
    }
    done = subprocess.run(
        [sys.executable, str(LM_EVAL), str(tasks), json.dumps(models)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


def test_lm_eval_has_the_figures_of_its_own_backend_on_the_unsplit_model(
    gateway: str, tasks: Path, tmp_path: Path
) -> None:
    folder = demo_folder(tmp_path)
    remote = (
        f"base_url={gateway}/v1/completions,model=demo,tokenizer={folder},"
        "tokenized_requests=True,max_length=512,num_concurrent=1,add_bos_token=True"
    )
    local = f"pretrained={folder},dtype=float32,max_length=512"

    found, expected = evaluated(tasks, [("local-completions", remote), ("hf", local)])

    for task in ("choices", "writing"):
        figures = {name: value for name, value in found["results"][task].items() if "," in name}
        assert len(figures) >= 2
        assert figures == {name: expected["results"][task][name] for name in figures}
    for mine, theirs in zip(
        found["samples"]["choices"], expected["samples"]["choices"], strict=True
    ):
        for (score, greedy), (score_too, greedy_too) in zip(mine, theirs, strict=True):
            assert float(score) == pytest.approx(float(score_too), abs=1e-4)
            assert str(greedy) == str(greedy_too)
    assert found["samples"]["writing"] == expected["samples"]["writing"]


def demo_folder(tmp_path: Path) -> Path:
    """Return a folder with the built-in model, as others read it."""
    import splitlearn_core.builtin  # noqa: PLC0415 - one test alone

    source = Path(next(iter(splitlearn_core.builtin.__path__))) / "demo"
    folder = tmp_path / "demo"
    folder.symlink_to(source)
    return folder


# --- A Trunk that is killed ----------------------------------------------------------------


def test_a_trunk_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """One pipeline gives up soon, and ends its own requests alone; the other one waits for it."""
    options: dict[str, Any] = {"prompt": PROMPTS[0], "temperature": 0, "stream": True}
    options |= {"extra_body": {"ignore_eos": True}, "max_tokens": 120}
    with ExitStack() as stack:
        trunk = stack.enter_context(Process(tmp_path, "trunk", [trunk_model()]))
        patient, whole = gateway_models(trunk.url)
        hasty = {**patient, "model_id": "hasty"}
        hasty["config"] = {**patient["config"], "retry": {"attempts": 1, "total": 0.5}}
        patient["config"]["retry"] = {"attempts": 1000, "total": 300.0}
        home = stack.enter_context(Process(tmp_path, "gateway", [patient, hasty, whole]))
        client = stack.enter_context(
            openai.OpenAI(base_url=f"{home.url}/v1", api_key="any", max_retries=0)
        )
        streams = {
            model: client.completions.create(model=model, **options)
            for model in ("demo", "hasty", "whole")
        }
        pieces = {model: [next(iter(stream))] for model, stream in streams.items()}
        trunk.end(signal.SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            list(streams["hasty"])
        assert caught.value.code == "trunk_unavailable"

        port = int(trunk.url.rsplit(":", 1)[1])
        again = stack.enter_context(Process(tmp_path, "again", [trunk_model()], port))
        for model in ("demo", "whole"):
            pieces[model] += list(streams[model])
            assert pieces[model][-1].choices[0].finish_reason == "length"
        texts = {m: "".join(piece.choices[0].text for piece in pieces[m]) for m in pieces}
        assert texts["demo"] == texts["whole"]
        answer = client.completions.create(model="hasty", prompt="Hello", max_tokens=2)
        assert answer.choices[0].finish_reason
        assert home.end() == 0
        assert again.end() == 0
