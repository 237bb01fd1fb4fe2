"""What is refused rather than done wrongly: code, dtypes that weights can't have, mixed chains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import CheckpointError, SplitCausalLM, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.quickstart import load_split_model, load_tokenizer

BUILT_IN = Path(__file__).parents[2] / "splitlearn_core/builtin/demo"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Return a copy of the built-in model, to be damaged."""
    return Path(shutil.copytree(BUILT_IN, tmp_path / "demo"))


def test_a_tokenizers_own_code_is_never_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = demo / "ran"
    (demo / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass EvilTok: ...\n")
    settings = demo / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(
        json.dumps(
            config
            | {"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["evil.EvilTok", None]}}
        )
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    try:
        load_tokenizer(demo)
    except CheckpointError as error:
        assert "which is never run" in str(error)  # noqa: PT017 - either is right
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", '{"a": 1}'), ("tokenizer.json", "{"), ("tokenizer_config.json", "[]")],
)
def test_a_damaged_tokenizer_is_named(demo: Path, file: str, content: str) -> None:
    (demo / file).write_text(content)

    with pytest.raises(CheckpointError, match=rf"demo.*{file}.*can't be read"):
        load_tokenizer(demo)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "int4", 5])
def test_a_dtype_that_weights_can_not_have(demo: Path, dtype: object) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps(config | {"dtype": dtype}))

    with pytest.raises(CheckpointError, match=r"config\.json: dtype is .*; weights can be float32"):
        load_component(demo, "trunk", [2, 6])


def test_the_older_name_of_a_dtype_will_do(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    config.pop("dtype", None)
    (demo / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))

    assert load_component(demo, "trunk", [2, 6]).dtype is torch.float16


def test_a_part_saved_under_the_old_name_is_found_by_it(demo: Path, tmp_path: Path) -> None:
    trunk = load_component(demo, "trunk", [2, 6])
    trunk.save(tmp_path / "out/trunk.pt")

    assert (tmp_path / "out/trunk").is_dir()
    assert SplitModel.load(tmp_path / "out/trunk.pt").start_layer == 2


def test_chains_of_several_models_or_with_holes(make_checkpoint: Callable[..., Any]) -> None:
    qwen2: Any = load_split_model("auto", [2, 4], make_checkpoint("qwen2").path)
    llama: Any = load_split_model("auto", [2, 4], make_checkpoint("llama").path)

    with pytest.raises(ValueError, match="Bottom is of a qwen2, trunk of a llama"):
        SplitCausalLM(qwen2[0], llama[1], qwen2[2])
    with pytest.raises(ValueError, match="a part of the chain is None"):
        SplitCausalLM(qwen2[0], None, qwen2[2])
    with pytest.raises(NotImplementedError, match=r"part\.save"):
        SplitCausalLM(*qwen2).save_pretrained("anywhere")


def test_what_goes_along_is_not_cast() -> None:
    state = HiddenState(torch.zeros(1, 2, 4), {"input_ids": torch.ones(1, 2, dtype=torch.long)})

    assert state.to("cpu").side["input_ids"].dtype is torch.long
    with pytest.raises(TypeError, match="keeps its dtypes"):
        state.to(torch.bfloat16)  # type: ignore[arg-type]
