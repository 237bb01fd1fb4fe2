"""What people do with a transformers model works with one whose Trunk is elsewhere, equally."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_fakes import daemon_in_thread
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_full_model, load_tokenizer
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.client import connect
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.config.server_config import ManagerLimits

TYPES = ["gpt2", "qwen2", "gemma3_text", "bamba", "mamba"]
POINTS = [2, 4]
PROMPT = "The function returns"
CHAT = [{"role": "user", "content": "What is a list?"}]
LIST = [PROMPT, "If the list is empty, then", "x"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Pair:
    """A model whole, and split with its Trunk elsewhere."""

    whole: Any
    split: SplitCausalLM

    def both(self, how: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Do something with the one and the other, from the same seed."""
        results = []
        for model in (self.whole, self.split):
            torch.manual_seed(0)
            results.append(how(model))
        return results[0], results[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for model_type in TYPES:
        tiny_model(model_type).save_pretrained(root / model_type)
    return {model_type: root / model_type for model_type in TYPES}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    models = [
        ModelConfig(name, str(folder), config={"component": "trunk", "split_points": POINTS})
        for name, folder in folders.items()
    ]
    part = {"component": "trunk", "split_points": [2, 6]}
    models.append(ModelConfig("demo", "builtin:demo", dtype="float32", config=part))
    # one row after the other: the last bits depend on who else is in a forward
    server = ServerConfig(port=0, max_batch_size=16)
    manager = ManagerLimits(max_models=len(models))
    config = DaemonConfig(server=server, manager=manager, models=tuple(models))
    with daemon_in_thread(config) as daemon:
        yield daemon.url


@pytest.fixture(scope="module")
def demo(url: str) -> Iterator[Pair]:
    whole, _ = load_full_model("builtin:demo", dtype="float32")
    with connect("builtin:demo", [2, 6], url, trunk_model_id="demo") as split:
        yield Pair(whole, split)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:demo")


@pytest.fixture(scope="module", params=TYPES)
def pair(request: pytest.FixtureRequest, url: str, folders: dict[str, Path]) -> Iterator[Pair]:
    folder = folders[request.param]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with connect(folder, POINTS, url, trunk_model_id=request.param) as split:
        yield Pair(whole, split)


def equal(one: Any, other: Any) -> bool:
    """Whether nested results hold the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


IDS = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(4)).repeat(1, 2)
BATCH = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(BATCH)
MASK[0, :4] = MASK[1, :2] = 0
NEW: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0}


def scores(model: Any) -> Any:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    made = model.generate(BATCH, attention_mask=MASK, **NEW, **wanted)
    likely = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    return made.sequences, made.scores, made.logits, likely


def turns(model: Any) -> Any:
    """Give a cache back with more ids, three times."""
    ids, mask, cache, seen = BATCH, MASK, None, []
    for turn in range(3):
        made = model.generate(
            ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **NEW
        )
        said = torch.full((3, 3), 5 + turn)
        ids, cache = torch.cat([made.sequences, said], dim=1), made.past_key_values
        mask = torch.cat([MASK, torch.ones(3, ids.shape[1] - 9, dtype=torch.long)], dim=1)
        seen.append(made.sequences)
    return seen


WAYS: dict[str, Callable[[Any], Any]] = {
    "a padded batch": lambda m: m.generate(BATCH, attention_mask=MASK, **NEW),
    "sampled": lambda m: m.generate(
        BATCH, attention_mask=MASK, do_sample=True, top_k=20, num_return_sequences=2, **NEW
    ),
    "beams": lambda m: m.generate(
        BATCH, attention_mask=MASK, num_beams=3, num_return_sequences=2, **NEW
    ),
    "scores": scores,
    "turns": turns,
    "processors": lambda m: m.generate(
        IDS,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        bad_words_ids=[[7]],
        min_new_tokens=4,
        logits_processor=LogitsProcessorList([lambda _, found: found.roll(1, -1)]),
        **NEW,
    ),
    "stopping criteria": lambda m: m.generate(
        IDS,
        stopping_criteria=StoppingCriteriaList([lambda ids, _: ids[:, -1] > 40]),
        **NEW,
    ),
    "a generation config": lambda m: m.generate(
        IDS,
        generation_config=GenerationConfig(
            max_new_tokens=5, do_sample=True, top_p=0.9, pad_token_id=0, eos_token_id=3
        ),
    ),
    "the model's own": lambda m: m.generate(IDS, max_length=24),
    "a time limit": lambda m: m.generate(IDS, max_time=600.0, **NEW),
    "no cache": lambda m: m.generate(IDS, use_cache=False, **NEW),
    "several ends": lambda m: m.generate(
        BATCH, attention_mask=MASK, eos_token_id=list(range(40, 90)), **NEW
    ),
    "guidance": lambda m: m.generate(IDS, guidance_scale=1.5, **NEW),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_generates_what_the_unsplit_model_does(pair: Pair, way: str) -> None:
    if way == "turns" and pair.whole.config.model_type == "mamba":
        pytest.skip("transformers can't go on from a cache that counts no positions")
    expected, found = pair.both(WAYS[way])

    assert equal(found, expected)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_speculation_is_equal_too(pair: Pair, way: str, sampled: bool) -> None:
    if pair.whole.config.model_type in {"bamba", "mamba"}:
        pytest.skip("transformers can't take back recurrent states")
    helper = copy.deepcopy(pair.whole)
    generator = torch.Generator().manual_seed(1)
    for weight in helper.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.002)
    how = {"prompt_lookup_num_tokens": 4} if way == "prompt lookup" else {"assistant_model": helper}

    expected, found = pair.both(lambda m: m.generate(IDS, do_sample=sampled, **how, **NEW))

    assert equal(found, expected)


TEXT_WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a string": (PROMPT, {}),
    "strings": (LIST, {}),
    "a batch": (LIST, {"batch_size": 3}),
    "a chat": (CHAT, {}),
    "chats in a batch": ([CHAT, [{"role": "user", "content": "Hello"}]], {"batch_size": 2}),
    "several": (PROMPT, {"do_sample": True, "num_return_sequences": 3, "return_full_text": False}),
    "prompt lookup": (PROMPT, {"prompt_lookup_num_tokens": 3}),
    "beams": (PROMPT, {"num_beams": 2}),
}


@pytest.mark.parametrize("way", TEXT_WAYS)
def test_a_pipeline_of_transformers(demo: Pair, tokenizer: Any, way: str) -> None:
    given, options = TEXT_WAYS[way]

    def text(model: Any) -> Any:
        run: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return run(given, max_new_tokens=8, **options)

    expected, found = demo.both(text)

    assert found == expected


def test_stop_strings(demo: Pair, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")

    expected, found = demo.both(
        lambda m: m.generate(
            **inputs, max_new_tokens=40, stop_strings=["the ", "."], tokenizer=tokenizer
        )
    )

    assert equal(found, expected)
    assert found.shape[1] < inputs.input_ids.shape[1] + 40


def test_a_streamer_in_a_thread(demo: Pair, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def pieces(model: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {**inputs, "max_new_tokens": 10, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        found = list(streamer)
        thread.join()
        return found

    expected, found = demo.both(pieces)

    assert found == expected
    assert len(found) > 3


def test_a_cache_that_is_given_back_sends_only_what_is_new(demo: Pair, tokenizer: Any) -> None:
    trunk = demo.split.parts[1]
    ids = tokenizer("The quick list of names is " * 20, return_tensors="pt").input_ids
    generate: Any = demo.split.generate
    made = generate(ids, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    before = trunk.bytes_sent

    generate(
        torch.cat([made.sequences, ids[:, :3]], dim=1),
        past_key_values=made.past_key_values,
        max_new_tokens=1,
    )

    state = 192 * 4
    assert 4 * state <= trunk.bytes_sent - before < 5 * state + 200


def test_the_harness_of_lm_eval(demo: Pair, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance  # noqa: PLC0415 - slow
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    def asked(kind: str, *cases: Any) -> list[Any]:
        return [Instance(kind, {}, case, number) for number, case in enumerate(cases)]

    def figures(model: Any) -> Any:
        harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        pairs = [("The function", " returns a list"), ("If the", " value is none then")]
        until = {"until": ["\n"], "max_gen_toks": 8}
        return (
            harness.loglikelihood(asked("loglikelihood", *pairs)),
            harness.generate_until(asked("generate_until", (PROMPT, until))),
            harness.loglikelihood_rolling(asked("loglikelihood_rolling", (PROMPT * 4,))),
        )

    expected, found = demo.both(figures)

    assert found == expected


def test_an_assistant_of_another_vocabulary(demo: Pair, tokenizer: Any) -> None:
    """Its guesses travel as text: transformers then wants both tokenizers."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|one more|>"])
    config = tiny_config("qwen2")
    config.vocab_size = len(other)
    torch.manual_seed(0)
    helper = AutoModelForCausalLM.from_config(config).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")

    plain = demo.split.generate(**inputs, max_new_tokens=12, do_sample=False)  # type: ignore[misc]
    expected, found = demo.both(
        lambda m: m.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            assistant_model=helper,
            tokenizer=tokenizer,
            assistant_tokenizer=other,
        )
    )

    assert equal(found, expected)
    assert equal(found, plain)
