"""The built-in model is an ordinary Hugging Face folder, small, and has visibly learned.

The loss is measured on docstrings of standard library files that the training script holds out
by their names, read from the Python that runs the tests.  So it shows that the model predicts
documentation it was not trained on better than any table of token frequencies could.  It does not
show that the model knows anything, nor that those files share no phrases with the training text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "splitlearn_core" / "builtin" / "demo"
HELD_OUT_FILES = ["getopt.py", "secrets.py", "html/__init__.py", "unittest/result.py", "enum.py"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the training script as a module."""
    name = "train_demo_model"
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def documents(script: ModuleType, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return held-out texts as token ids, each after `<s>` and within the model's positions."""
    root = script.stdlib_root()
    sources = [script.file_source(n, (root / n).read_text("utf-8")) for n in HELD_OUT_FILES]
    texts = [text for source in sources for text in source.texts]
    return [tokenizer(text, truncation=True)["input_ids"] for text in texts]


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert sorted(files) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(files.values()) <= 10_000_000


def test_shape_and_stored_dtype() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 8
    assert config["dtype"] == "float16"
    with safe_open(DEMO / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert dtypes == {"F16"}


def test_no_path_of_the_machine_that_made_it() -> None:
    for path in DEMO.glob("*.json"):
        if path.name != "tokenizer.json":  # whose vocabulary is words such as /usr
            text = path.read_text()
            assert "name_or_path" not in text
            assert not re.search(r'"(/|[A-Za-z]:\\)', text), f"absolute path in {path.name}"


def test_special_tokens_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer, name)
        assert getattr(model.config, name) == expected
        assert getattr(model.generation_config, name) == expected
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@given(text=st.text(max_size=80))
@settings(max_examples=60)
def test_any_text_comes_back_from_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does shutil.move do?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<s><|system|>Be brief.</s><|user|>What does shutil.move do?</s><|assistant|>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = [tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user")]
    assert all(mark in ids for mark in marks)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_chat_template_refuses_other_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_files_of_the_loss_are_held_out(script: ModuleType) -> None:
    assert all(script.is_held_out(name) for name in HELD_OUT_FILES)


@torch.no_grad()
def test_loss_is_clearly_below_the_best_unigram(
    model: PreTrainedModel, documents: list[list[int]]
) -> None:
    """Even frequencies counted on these very tokens, which no unigram beats, do much worse."""
    counts = Counter(token for document in documents for token in document[1:])
    total = counts.total()
    best_unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    nats = 0.0
    for document in documents:
        ids = torch.tensor([document])
        nats += model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1)
    assert total > 2000
    assert nats / total < best_unigram - 0.7


def test_note_has_both_figures_of_these_weights() -> None:
    note = (DEMO / "README.md").read_text()
    rows = re.findall(r"^\| (this|unigram) model.*\| (\d\.\d+) \|$", note, re.MULTILINE)
    figures = {name: float(figure) for name, figure in rows}
    assert figures["this"] < figures["unigram"] - 1.0
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert f"SHA-256 `{digest}`" in note


@pytest.mark.parametrize("prompt", ["Return the", "The function returns", "If the file"])
def test_greedy_text_does_not_loop_at_once(
    prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    new = output[inputs["input_ids"].shape[1] :].tolist()
    triples = list(zip(new, new[1:], new[2:], strict=False))
    assert len(new) >= 4
    assert len(set(triples)) >= 0.7 * len(triples)


# --- what the script takes from Python's own text ---

CODE = '''\
"""Move files from here to there.  Nothing else."""

# A comment that is long enough to count,
# over two lines.
x = 1  # beside code: not taken, whatever its length

class Mover:
    """Moves one file at a time, slowly.

    >>> Mover()
    Mover()
    """

    async def move(self):
        """Return the file that was moved."""
'''


def test_file_source_takes_docstrings_and_comments(script: ModuleType) -> None:
    source = script.file_source("shutil/__init__.py", CODE)
    assert source.texts == [
        "Move files from here to there.  Nothing else.",
        "Moves one file at a time, slowly.",
        "Return the file that was moved.",
        "A comment that is long enough to count,\nover two lines.",
    ]
    assert [(q.question, q.answer) for q in source.questions] == [
        ("What is shutil?", "Move files from here to there."),
        ("What is shutil.Mover?", "Moves one file at a time, slowly."),
        ("What does shutil.Mover.move do?", "Return the file that was moved."),
    ]


def test_text_of_both_halves_is_not_held_out(script: ModuleType) -> None:
    held, kept = "getopt.py", "shutil.py"
    corpus = script.split(
        [script.Source(held, ["in both", "held"]), script.Source(kept, ["in both", "kept", "kept"])]
    )
    assert (corpus.train, corpus.held_out) == (["in both", "kept"], ["held"])


def test_unigram_loss_counts_what_the_model_predicts(script: ModuleType) -> None:
    bos, a, b = 1, 10, 11
    total = 4 + script.VOCAB_SIZE
    expected = -(math.log(4 / total) + math.log(1 / total)) / 2
    assert script.unigram_loss([[bos, a, a, a, 12]], [[bos, a, b]]) == pytest.approx(expected)


def test_batches_cover_the_tokens_in_short_then_full_windows(script: ModuleType) -> None:
    batches = list(script.batches([[1, 2, 3], [4, 5]], steps=10))
    lengths = [windows.shape[1] - 1 for windows in batches]
    assert lengths == [script.SHORT_WINDOW] * 7 + [script.CONTEXT] * 3
    assert all(w[:, 1:].numel() == script.STEP_TOKENS for w in batches)
    assert torch.equal(batches[0][0, -1], batches[0][1, 0])
