"""A folder served and talked with in two commands, and a chain of Trunks over two daemons."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.quickstart import load_full_model, load_tokenizer
from splitlearn_manager.cli import main
from splitlearn_manager.client import connect

COMMAND = [sys.executable, "-m", "splitlearn_manager"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
PROMPT = "The function returns"


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """Run `splitlearn serve` until it is ready; yields the address, ends with SIGTERM."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *map(str, arguments), "--port", "0"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    address = ""
    try:
        for line in process.stdout or ():
            if match := re.search(r"listening on (\S+)", line):
                address = match.group(1)
            if "ready" in line:
                break
        assert address
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


Told = Callable[[list[str]], tuple[object, str]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Return a function that runs the command line in this process: exit code, and what it says."""

    def run_here(arguments: list[str]) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["splitlearn", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of somebody's own: a random Qwen2 with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "my model"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer("builtin:demo").save_pretrained(path)
    return path


def expected_text(model: object, prompt: str, new: int) -> str:
    unsplit, tokenizer = load_full_model(str(model), dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made: Any = unsplit.generate(ids, max_new_tokens=new, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def expected_answer(model: object, text: str, new: int) -> str:
    unsplit, tokenizer = load_full_model(str(model), dtype="float32")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made: Any = unsplit.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=new, do_sample=False
    )
    start = inputs.input_ids.shape[1]
    return str(tokenizer.decode(made[0, start:], skip_special_tokens=True))


def test_bottom_and_top_are_all_that_is_needed_at_home(folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    written = run("split", folder, "--split-points", "2,4", "--out", parts)
    assert written.returncode == 0, written.stderr
    shutil.move(parts / "trunk", tmp_path / "server")

    with served(tmp_path / "server", "--split", "2,4") as address:
        made = run(
            *("generate", parts, "--trunk", address, "--prompt", PROMPT, "--json"),
            *("--max-new-tokens", 8),
        )
    alone = run("generate", parts, "--prompt", PROMPT)

    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["text"] == expected_text(folder, PROMPT, 8)
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "(bottom [0, 2), top [4, 6)) lacks tensors that are needed" in alone.stderr


def test_a_folder_is_served_and_talked_with(folder: Path, told: Told) -> None:
    with served(folder, "--split", "2,4") as address:
        chat = run(
            *("chat", folder, "--trunk", address, "--max-new-tokens", 8, "--temperature", 0),
            text="Hello there\n/stats\n",
        )
        reported = run(
            *("generate", folder, "--trunk", address, "--prompt", "-", "--json"),
            *("--max-new-tokens", 8, "--prompt-lookup", 3),
            text=f"{PROMPT}\n",
        )
        wrong = told(["generate", str(folder), "--split=1,4", "--trunk", address, "-p", PROMPT])
        other = told(["chat", "builtin:demo", "--trunk", address])

    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip() == expected_answer(folder, "Hello there", 8).strip()
    assert re.search(rf"trunk +2-3 +{re.escape(address)} +float32", chat.stderr)
    assert "wire" in chat.stderr
    result = json.loads(reported.stdout)
    assert result["text"] == expected_text(folder, PROMPT, 8)
    assert [part["component"] for part in result["parts"]] == ["bottom", "trunk", "top"]
    assert [part["here"] for part in result["parts"]] == [True, False, True]
    assert result["parts"][1]["where"] == address
    assert result["tokens_per_round_trip"] >= 1
    assert result["timings"]["trunk"] > 0
    assert result["timings"]["queue"] >= 0
    spent = sum(result["timings"][name] for name in ("bottom", "wire", "queue", "trunk", "top"))
    assert spent < result["timings"]["seconds"]
    assert wrong[0] == other[0] == 1
    assert "has the layers [2, 4), and split_points [1, 4] leave it [1, 4)" in wrong[1]
    assert "is of a qwen2 of 6 layers with hidden size 64" in other[1]


def test_the_built_in_model_with_a_breakdown_and_a_chain_found_by_itself() -> None:
    with served("builtin:demo", "--split", "2,4,6", "--dtype", "float32") as address:
        done = run(
            *("generate", "builtin:demo", "--trunk", address, "--prompt", PROMPT),
            *("--max-new-tokens", 12, "--timings"),
        )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected_text("builtin:demo", PROMPT, 12).strip()
    assert "12 tokens in" in done.stderr
    assert "sent " in done.stderr
    for words in ("trunk-0", "trunk-1", "here, ", "Bottom", "wire", "queue", "Trunk", "Top"):
        assert words in done.stderr


def test_a_chain_over_two_daemons(folder: Path, tmp_path: Path, told: Told) -> None:
    cuts = [1, 3, 5]
    configs = [
        {"model_id": f"middle-{n}", "model_path": str(folder), "dtype": "float32"}
        | {"config": {"component": f"trunk-{n}", "split_points": cuts}}
        for n in range(2)
    ]
    files = []
    for number, config in enumerate(configs):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump({"models": [config]}))
    unsplit, _ = load_full_model(str(folder), dtype="float32")
    ids = torch.randint(3, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
    ]
    with served("--config", files[0]) as first, served("--config", files[1]) as second:
        chain = [
            {"trunk": first, "trunk_model_id": "middle-0"},
            {"trunk": second, "trunk_model_id": "middle-1"},
        ]
        with connect(folder, cuts, chain=chain) as model:
            for way in ways:
                settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, **way}
                outputs = []
                for generator in (unsplit, model):
                    torch.manual_seed(3)
                    outputs.append(generator.generate(ids, **settings))  # type: ignore[operator, misc]
                assert torch.equal(*outputs), way
        named = run(
            *("generate", folder, "--chain", f"middle-0@{first}", "--chain", f"middle-1@{second}"),
            *("--prompt", PROMPT, "--max-new-tokens", 8),
        )
        links = [f"--chain=middle-1@{second}", f"--chain=middle-0@{first}"]
        turned = told(["generate", str(folder), "--prompt", PROMPT, *links])

    assert named.returncode == 0, named.stderr
    assert named.stdout.strip() == expected_text(folder, PROMPT, 8).strip()
    assert turned[0] == 1
    assert "give them in the order of their layers" in turned[1]


def test_without_a_trunk_all_of_it_is_here(folder: Path) -> None:
    done = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")

    result = json.loads(done.stdout)
    assert result["text"] == expected_text(folder, PROMPT, 8)
    assert [part["component"] for part in result["parts"]] == ["full"]
    assert result["timings"] is None
    assert result["bytes_sent"] == 0


WRONG: dict[str, tuple[list[str], str]] = {
    "serve nothing": (["serve"], "give a MODEL with --split, or --config FILE"),
    "serve without cuts": (["serve", "builtin:demo"], "--split is needed"),
    "serve a file and a model": (
        ["serve", "builtin:demo", "--config", "configs/demo-trunk.yaml"],
        "give a MODEL with --split, or --config FILE",
    ),
    "serve a file with options": (
        ["serve", "--config", "configs/demo-trunk.yaml", "--split", "2,6", "--dtype", "float32"],
        "--split, --dtype: with --config",
    ),
    "serve too many layers": (["serve", "builtin:demo", "--split", "2,9"], "8 layers"),
    "serve no numbers": (["serve", "builtin:demo", "--split", "two"], "layer numbers"),
    "serve no folder": (["serve", "/no/such/model", "--split", "2,6"], "/no/such/model"),
    "serve another dtype": (
        ["serve", "builtin:demo", "--split", "2,6", "--dtype", "int4"],
        "must be one of float32",
    ),
    "serve one name for two": (
        ["serve", "builtin:demo", "--split", "2,4,6", "--model-id", "x"],
        "--model-id names one model, and 2 Trunks are served",
    ),
    "serve to everybody": (
        ["serve", "builtin:demo", "--split", "2,6", "--host", "0.0.0.0"],  # noqa: S104
        "needs a token",
    ),
    "chat with nothing": (["chat"], "give a MODEL, or --config FILE"),
    "chat with cuts alone": (["chat", "builtin:demo", "--split", "2,6"], "--split: needs --trunk"),
    "chat with a file and options": (
        ["chat", "--config", "configs/demo-client.yaml", "--dtype", "float32"],
        "--dtype: with --config, the file says that",
    ),
    "two ways to guess": (
        ["chat", "builtin:demo", "--prompt-lookup", "3", "--assistant", "builtin:demo"],
        "give --prompt-lookup or --assistant, not both",
    ),
    "no link": (
        ["generate", "builtin:demo", "-p", "x", "--chain", "http://127.0.0.1:9"],
        "--chain takes ID@ADDRESS",
    ),
    "both kinds of Trunk": (
        ["generate", "builtin:demo", "-p", "x", "--chain", "a@http://h:1", "--trunk", "http://h:1"],
        "give --trunk or --chain, not both",
    ),
    "no model": (["generate", "/no/such/model", "-p", "x"], "/no/such/model"),
    "no address": (
        ["generate", "builtin:demo", "-p", "x", "--trunk", "localhost"],
        "must be an address such as http://host:8000",
    ),
}


@pytest.mark.parametrize(("arguments", "named"), WRONG.values(), ids=list(WRONG))
def test_wrong_usage_is_named(arguments: list[str], named: str, told: Told) -> None:
    code, said = told(arguments)

    assert code == 2, said
    assert named in said


def test_a_trunk_that_is_not_there(told: Told) -> None:
    code, said = told(["chat", "builtin:demo", "--trunk", "http://127.0.0.1:9"])

    assert code == 1
    assert "cannot reach http://127.0.0.1:9" in said
