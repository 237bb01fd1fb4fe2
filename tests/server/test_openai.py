"""OpenAI's clients at a gateway whose Trunk is at another daemon, and at a whole model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from gateways import Unsplit, daemon_of, pipeline_config, trunk_config, whole_config
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import ask

from splitlearn_manager import ModelConfig

PROMPT = "The function returns"
PROMPTS = [PROMPT, "def main(", "Hello", "import os\n", "A list of", "x = "]
CHAT: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unsplit() -> Unsplit:
    return Unsplit()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Yield the address of a gateway, which also has a whole model, and a part of one."""
    bottom = ModelConfig(
        "part", "builtin:demo", config={"component": "bottom", "split_points": [2, 6]}
    )
    with daemon_of(trunk_config()) as trunk:
        models = (pipeline_config(trunk.url), whole_config(), bottom)
        with daemon_of(*models, max_batch_size=16) as gateway:
            yield gateway.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def async_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


both = pytest.mark.parametrize("model", ["demo", "whole"])


# --- Models --------------------------------------------------------------------------------


def test_models_that_answer_are_listed(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}

    assert list(models) == ["demo", "whole"]
    assert models["demo"].owned_by == "splitlearn"
    assert models["demo"].created > 1_700_000_000
    assert client.models.retrieve("whole").id == "whole"


@pytest.mark.parametrize("name", ["nothing", "org/name"])
def test_a_model_that_is_not_there(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: demo, whole") as caught:
        client.models.retrieve(name)
    assert caught.value.code == "model_not_found"

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=name, prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id


def test_a_part_gives_no_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="only a part of a model") as caught:
        client.completions.create(model="part", prompt="x")
    assert caught.value.code == "model_not_generative"


# --- Completions ---------------------------------------------------------------------------


@both
def test_a_completion_is_the_unsplit_models(
    client: openai.OpenAI, unsplit: Unsplit, model: str
) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)

    (choice,) = answer.choices
    assert choice.text == unsplit.text(PROMPT, 24)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.object == "text_completion"
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(unsplit.tokenizer(PROMPT).input_ids)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == 24 + answer.usage.prompt_tokens


@both
def test_prompts_of_one_request_are_answered_in_their_order(
    client: openai.OpenAI, unsplit: Unsplit, model: str
) -> None:
    tokens = [unsplit.tokenizer(prompt).input_ids for prompt in PROMPTS]
    given: list[Any] = [PROMPTS, tokens, tokens[0]]

    found = [
        [
            choice.text
            for choice in client.completions.create(
                model=model, prompt=prompt, max_tokens=8, temperature=0
            ).choices
        ]
        for prompt in given
    ]

    expected = [unsplit.text(prompt, 8) for prompt in PROMPTS]
    assert found == [expected, expected, expected[:1]]


def test_sixteen_tokens_where_none_are_named(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_many_at_once_share_forwards_and_get_what_they_would_alone(
    url: str, unsplit: Unsplit
) -> None:
    prompts = [f"{prompt} {number}" for number in range(4) for prompt in PROMPTS]

    async def run() -> list[str]:
        async with async_client(url) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="demo", prompt=prompt, max_tokens=8, temperature=0
                    )
                    for prompt in prompts
                )
            )
        return [answer.choices[0].text for answer in answers]

    before = metric(url, "splitlearn_generation_batch_rows", "count")
    rows = metric(url, "splitlearn_generation_batch_rows", "sum")
    found = asyncio.run(run())

    assert found == [unsplit.text(prompt, 8) for prompt in prompts]
    forwards = metric(url, "splitlearn_generation_batch_rows", "count") - before
    rows = metric(url, "splitlearn_generation_batch_rows", "sum") - rows
    assert rows <= len(prompts) * 7
    assert rows / forwards > 2


def metric(url: str, name: str, suffix: str, model: str = "demo") -> float:
    text = ask(url, "/metrics").body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{name}_{suffix}" and sample.labels.get("model") == model:
                return sample.value
    return 0.0


@both
def test_a_stream_is_the_same_text(client: openai.OpenAI, unsplit: Unsplit, model: str) -> None:
    chunks = list(
        client.completions.create(
            model=model,
            prompt=PROMPTS[:2],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    *pieces, last = chunks
    for number, prompt in enumerate(PROMPTS[:2]):
        own = [c.choices[0] for c in pieces if c.choices[0].index == number]
        assert "".join(choice.text for choice in own) == unsplit.text(prompt, 12)
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_is_no_json_array(url: str) -> None:
    body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 2, "stream": True})
    answer = ask(url, "/v1/completions", "POST", body.encode())

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    *events, done, rest = answer.body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_a_stop_text_ends_an_answer_and_is_not_in_it(
    client: openai.OpenAI, unsplit: Unsplit
) -> None:
    text = unsplit.text(PROMPT, 24)
    stop = text[20:26]
    expected = text[: text.index(stop)]
    options: dict[str, Any] = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "stop": ["not in it", stop],
    }

    whole = client.completions.create(**options)
    pieces = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]

    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens < 24


def test_answers_with_a_seed_are_the_same_each_time(url: str) -> None:
    async def run() -> list[list[str]]:
        async with async_client(url) as client:

            async def answers(prompt: str, seed: int | None) -> list[str]:
                answer = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=12, n=3, seed=seed, top_p=0.95
                )
                return [choice.text for choice in answer.choices]

            alone = await answers(PROMPT, 7)
            beside = await asyncio.gather(
                answers(PROMPT, 7), answers("Hello", 7), answers(PROMPT, None)
            )
            return [alone, *beside]

    alone, again, _, other = asyncio.run(run())

    assert alone == again
    assert len(set(alone)) == 3
    assert other != alone


def test_the_best_of_several_is_given(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "seed": 3}
    every = client.completions.create(**options, n=4, logprobs=0)
    best = client.completions.create(**options, n=2, best_of=4)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = sorted(every.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens


@both
def test_probabilities_of_prompt_and_answer(
    client: openai.OpenAI, unsplit: Unsplit, model: str
) -> None:
    tokens = unsplit.tokenizer(PROMPT).input_ids
    new = unsplit.tokens(PROMPT, 3)
    expected = unsplit.logprobs(tokens + new)

    answer = client.completions.create(
        model=model, prompt=tokens, max_tokens=3, temperature=0, echo=True, logprobs=2
    )

    choice = answer.choices[0]
    assert choice.text == PROMPT + unsplit.text(PROMPT, 3)
    told = choice.logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    assert told.text_offset is not None
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    follow = (tokens + new)[1:]
    assert told.token_logprobs[1:] == pytest.approx(
        [float(expected[place, token]) for place, token in enumerate(follow)], abs=1e-4
    )
    for place, top in enumerate(told.top_logprobs[1:]):
        best = expected[place].topk(2)
        assert sorted(top.values())[-2:] == pytest.approx(sorted(best.values.tolist()), abs=1e-4)
        assert top[told.tokens[place + 1]] == told.token_logprobs[place + 1]
    assert told.tokens == [unsplit.tokenizer.decode([token]) for token in tokens + new]
    for token, start in zip(told.tokens[1:], told.text_offset[1:], strict=True):
        assert choice.text[start:].startswith(token)


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, unsplit: Unsplit) -> None:
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    )

    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == len(unsplit.tokenizer(PROMPT).input_ids)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_an_echo_streams_first(client: openai.OpenAI, unsplit: Unsplit) -> None:
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, stream=True
        )
    ]
    assert pieces[0] == PROMPT
    assert "".join(pieces) == PROMPT + unsplit.text(PROMPT, 4)


def test_the_models_end_ends_an_answer_unless_it_is_ignored(client: openai.OpenAI) -> None:
    """A bias makes the end the best token."""
    options: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 5}
    options |= {"temperature": 0, "logit_bias": {"2": 100}}

    ended = client.completions.create(**options)
    went_on = client.completions.create(**options, extra_body={"ignore_eos": True})

    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert went_on.choices[0].finish_reason == "length"
    assert went_on.usage is not None
    assert went_on.usage.completion_tokens == 5


# --- Chat ----------------------------------------------------------------------------------


@both
def test_a_chat_is_written_with_the_tokenizers_template(
    client: openai.OpenAI, unsplit: Unsplit, model: str
) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    plain = [messages[0], {"role": "user", "content": "Hello"}]
    ids = unsplit.tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    made = unsplit.model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = unsplit.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    answer = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=12, temperature=0
    )

    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_a_chat_streams(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**options, n=2)
    chunks = list(client.chat.completions.create(**options, n=2, stream=True))

    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=CHAT, max_tokens=100, seed=1, stop=" "
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content


def test_probabilities_in_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=6, seed=2, logprobs=True, top_logprobs=3
    )

    told = answer.choices[0].logprobs
    assert told is not None
    content = told.content or []
    text = b"".join(bytes(token.bytes or []) for token in content).decode()
    assert text.removesuffix("</s>") == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob


def test_messages_that_the_template_refuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="role must be system, user") as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )
    assert caught.value.param == "messages"


# --- What is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "code", "says"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_value", "valid number"),
        ({"temperature": -1}, "temperature", "invalid_value", "greater than or equal to 0"),
        ({"n": 0}, "n", "invalid_value", "found 0"),
        ({"n": 17}, "n", "invalid_value", "max_batch_size"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value", "found -1"),
        ({"prompt": 5}, "prompt", "invalid_value", "a list of texts"),
        ({"prompt": []}, "prompt", "invalid_value", "nothing in it"),
        ({"prompt": [[]]}, "prompt", "invalid_value", "no tokens"),
        ({"prompt": [5000]}, "prompt", "invalid_value", "0 to 4095, found 5000"),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt", "invalid_value", "400"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "no text"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "invalid_value", "found 5000"),
        ({"logprobs": 21}, "logprobs", "invalid_value", "found 21"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value", "at most 4"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value", "streamed"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter", "prompt alone"),
        ({"max_tokens": 600}, "prompt", "context_length_exceeded", "512 tokens, and 604"),
        ({"prompt": [5] * 512}, "prompt", "context_length_exceeded", "512 in the prompt"),
    ],
)
def test_a_request_that_is_wrong(
    url: str, change: dict[str, Any], param: str, code: str, says: str
) -> None:
    body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 2} | change)

    answer = ask(url, "/v1/completions", "POST", body.encode())

    assert answer.status == 400
    error = json.loads(answer.body)["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_a_chat_that_is_wrong(url: str, change: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "demo", "messages": CHAT, **change})

    answer = ask(url, "/v1/chat/completions", "POST", body.encode())

    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_none(url: str, body: bytes) -> None:
    answer = ask(url, "/v1/completions", "POST", body)

    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


def test_what_nobody_knows_is_left_out_of_account(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=CHAT,
        max_tokens=2,
        user="somebody",
        store=False,
        tool_choice="none",
        tools=[],
        response_format={"type": "text"},
        extra_body={"something": {"else": 1}},
    )
    assert answer.choices


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/v1/nothing", "GET", 404, "not_found"),
        ("/v1/embeddings", "POST", 404, "not_found"),
        ("/v1/completions", "GET", 405, "method_not_allowed"),
    ],
)
def test_errors_of_paths_have_the_form(
    url: str, path: str, method: str, status: int, code: str
) -> None:
    answer = ask(url, path, method)

    assert answer.status == status
    assert json.loads(answer.body)["error"]["code"] == code
