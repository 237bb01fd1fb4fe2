"""Bodies of requests as values."""

from __future__ import annotations

import pytest

from splitlearn_manager.generation.errors import BadRequestError
from splitlearn_manager.generation.requests import read_body, read_chat, read_completion

LEAST = {"model": "m", "prompt": "x"}


def test_what_is_null_is_as_if_it_were_not_there() -> None:
    named = ("n", "stop", "seed", "suffix", "logprobs", "temperature", "stream", "logit_bias")
    assert read_completion(LEAST | dict.fromkeys(named)) == read_completion(LEAST)


def test_prompts_in_every_form() -> None:
    forms: list[tuple[object, tuple[object, ...]]] = [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ]
    for given, expected in forms:
        assert read_completion({"model": "m", "prompt": given}).prompts == expected


def test_what_a_request_leaves_to_the_model() -> None:
    request = read_completion(LEAST | {"temperature": 0.5, "top_k": -1})

    assert request.sampling.temperature == 0.5
    assert request.sampling.top_k == 0
    assert request.unsaid == {"top_p", "min_p", "repetition_penalty"}


def test_the_newer_name_of_the_limit_goes_before() -> None:
    messages = [{"role": "user", "content": "x"}]
    chat = {"model": "m", "messages": messages, "max_tokens": 3}

    assert read_chat(chat).max_tokens == 3
    assert read_chat(chat | {"max_completion_tokens": 5}).max_tokens == 5


def test_parts_of_a_text_are_one_and_other_fields_go_to_the_template() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": "n"}, {"role": "assistant"}]

    request = read_chat({"model": "m", "messages": messages})

    assert request.messages == (
        {"role": "user", "content": "a\nb", "name": "n"},
        {"role": "assistant", "content": ""},
    )


@pytest.mark.parametrize("body", [b"", b"nan", b"[]", b'"x"', b"[" * 100_000])
def test_what_is_no_object(body: bytes) -> None:
    with pytest.raises(BadRequestError, match="the body"):
        read_body(body)


def test_no_number_stands_for_infinity() -> None:
    with pytest.raises(BadRequestError, match="finite"):
        read_completion(read_body(b'{"model": "m", "prompt": "x", "temperature": NaN}'))
