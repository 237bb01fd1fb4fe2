"""Prompts and answers that share forwards: each gets what `generate` of the unsplit model gives."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from splitlearn_core import SplitCausalLM
from splitlearn_core.factory import load_component
from splitlearn_core.page_sizes import HUGE
from splitlearn_core.quickstart import load_split_model
from splitlearn_manager.generation.decoder import Decoder
from splitlearn_manager.generation.errors import GenerationFailedError
from splitlearn_manager.generation.jobs import (
    Event,
    Failed,
    Job,
    NothingMade,
    PromptTold,
    TokenMade,
)
from splitlearn_manager.generation.sampling import Sampling, Wanted
from splitlearn_manager.generation.stages import Chain, Step, ids_of
from splitlearn_manager.serving.cache_memory import bytes_for

GREEDY = Sampling(temperature=0)
NEW = 6
LENGTHS = (5, 9, 1, 13)
JOINED = ["llama", "gpt2", "gemma2", "mamba", "falcon_h1", "bloom"]
ALONE = ["openai-gpt", "gemma3n_text", "recurrent_gemma"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small:
    """A small model, whole and in parts."""

    def __init__(self, model_type: str) -> None:
        torch.manual_seed(0)
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.unsplit = tiny_model(model_type).eval()
            self.unsplit.save_pretrained(folder)
            self.whole = load_component(folder, "full", mmap=False)
            parts: Any = load_split_model("auto", [2, 4], folder, low_memory=True, mmap=False)
        self.split = SplitCausalLM(*parts)
        generator = torch.Generator().manual_seed(3)
        self.prompts = [
            torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            for length in LENGTHS
        ]

    def expected(self, prompt: list[int], new: int = NEW) -> list[int]:
        """Return the tokens that transformers' `generate` makes of a prompt."""
        ids = torch.tensor([prompt])
        config = self.unsplit.generation_config
        config.eos_token_id = None
        made = self.unsplit.generate(
            ids, max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True
        )
        return list(made[0, len(prompt) :].tolist())


def run(decoder: Decoder, jobs: list[Job]) -> list[Event]:
    """Take jobs on, and run them to their end."""
    decoder.take(jobs)
    events: list[Event] = []
    while not decoder.is_idle:
        if decoder.chain.mixes and decoder.has_prompts:
            events += decoder.together()
        else:
            events += decoder.step()
            events += decoder.prefill()
    return events


def made(events: list[Event], job: Job, number: int = 0) -> list[int]:
    one = job.continuations[number]
    return [e.scored.token for e in events if isinstance(e, TokenMade) and e.continuation is one]


@pytest.fixture(scope="module")
def llama() -> Small:
    return Small("llama")


def decoder_of(model: Any, piece: int = 512) -> Decoder:
    return Decoder(Chain.of(model), piece=piece)


@pytest.mark.parametrize("piece", [512, 4])
@pytest.mark.parametrize("model_type", JOINED + ALONE)
def test_answers_are_those_of_the_unsplit_model(model_type: str, piece: int) -> None:
    small = Small(model_type)
    expected = [small.expected(prompt) for prompt in small.prompts]
    for model in (small.whole, small.split):
        jobs = [Job(tuple(prompt), GREEDY, Wanted(NEW)) for prompt in small.prompts]

        events = run(decoder_of(model, piece), jobs)

        assert not [event for event in events if isinstance(event, Failed)]
        assert [made(events, job) for job in jobs] == expected


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_steps_are_shared(model_type: str) -> None:
    small = Small(model_type)
    rows: list[int] = []
    small.split.top.register_forward_hook(
        lambda _, given, __: rows.append(given[0].shape[:2].numel())
    )
    jobs = [Job(tuple(prompt), GREEDY, Wanted(NEW)) for prompt in small.prompts]

    run(decoder_of(small.split), jobs)

    assert rows.count(len(jobs)) == NEW - 1


def test_prompts_and_answers_are_one_forward(llama: Small) -> None:
    decoder = decoder_of(llama.split, piece=8)
    seen: list[int] = []
    jobs = [Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1, 3)]
    decoder.take(jobs[:1])
    events = decoder.together() + decoder.together()
    handle = llama.split.top.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )

    events += run(decoder, jobs[1:])

    handle.remove()
    assert seen[0] > 1  # the answer's next token, and some of the prompts
    assert sum(seen) == sum(map(len, (llama.prompts[1], llama.prompts[3]))) + 3 * NEW - 4
    assert [made(events, job) for job in jobs] == [llama.expected(list(j.tokens)) for j in jobs]


def test_answers_that_begin_give_way_to_prompts_that_came_with_theirs_once(llama: Small) -> None:
    decoder = decoder_of(llama.split, piece=14)
    seen: list[int] = []
    jobs = [Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1, 3, 3)]
    decoder.take(jobs)
    handle = llama.split.top.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )

    events = [event for _ in range(4) for event in decoder.together()]
    # two prompts; the third and what there is room for of the fourth; steps of those three
    assert seen[:3] == [14, 14, 3]
    assert decoder.running >= 3
    handle.remove()

    events += run(decoder, [])
    assert [made(events, job) for job in jobs] == [llama.expected(list(j.tokens)) for j in jobs]


def test_answers_that_have_begun_give_way_no_more(llama: Small) -> None:
    decoder = decoder_of(llama.split)
    jobs = [Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1)]
    decoder.take(jobs[:1])
    events = decoder.together() + decoder.together()
    seen: list[int] = []
    handle = llama.split.top.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )

    decoder.take(jobs[1:])
    events += decoder.together()
    handle.remove()

    assert seen[0] > 1
    assert len(made(events, jobs[0])) == 3
    events += run(decoder, [])
    assert [made(events, job) for job in jobs] == [llama.expected(list(j.tokens)) for j in jobs]


def test_a_round_without_anybody_is_none(llama: Small) -> None:
    decoder = decoder_of(llama.split)
    job = Job(tuple(llama.prompts[0]), GREEDY, Wanted(NEW))
    decoder.take([job])
    job.continuations[0].unwanted = True

    assert decoder.together() == []
    assert not decoder._pace.knows_steps


def test_what_is_reserved_is_what_the_caches_of_all_parts_take(llama: Small) -> None:
    """Each part's is in huge pages of its own."""
    chain = Chain.of(llama.split)
    length = HUGE // 2 // chain.bytes_per_position[0] + 1
    lane = chain.new_lane()
    chain.run([Step(lane, ids_of([3] * length))])

    assert [cache.allocated_nbytes for cache in lane.caches] == [HUGE] * 3
    assert [bytes_for(part, 1, length) for part in chain.bytes_per_position] == [HUGE] * 3


def test_logits_are_those_of_the_positions_that_are_wanted(llama: Small) -> None:
    """Of a packed row, Top computes what is told of, and what the next token is chosen from."""
    told = Job(tuple(llama.prompts[3]), GREEDY, Wanted(1, logprobs=1, prompt_logprobs=True))
    other = Job(tuple(llama.prompts[1]), GREEDY, Wanted(NEW))
    decoder = decoder_of(llama.split)
    sizes: list[int] = []
    handle = llama.split.top.register_forward_hook(
        lambda _, __, output: sizes.append(output.logits.shape[1])
    )

    events = run(decoder, [other, told])

    handle.remove()
    assert sizes[0] == 1 + len(told.tokens)
    with torch.inference_mode():
        expected = llama.unsplit(torch.tensor([told.tokens])).logits[0].log_softmax(-1)
    (first,) = [event for event in events if isinstance(event, PromptTold)]
    assert [one.top[0][0] for one in first.told] == expected[:-1].argmax(-1).tolist()
    assert made(events, other) == llama.expected(list(other.tokens))


def test_a_job_that_comes_later_joins(llama: Small) -> None:
    decoder = decoder_of(llama.split)
    first, second = (Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1))
    decoder.take([first])
    events = decoder.prefill() + decoder.step()

    events += run(decoder, [second])

    assert made(events, first) == llama.expected(llama.prompts[0])
    assert made(events, second) == llama.expected(llama.prompts[1])


def test_answers_to_one_prompt_share_its_forward(llama: Small) -> None:
    decoder = decoder_of(llama.split)
    seen: list[int] = []
    handle = llama.split.bottom.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    prompt = tuple(llama.prompts[3])
    job = Job(prompt, Sampling(seed=4), Wanted(NEW, answers=3))
    alone = Job(prompt, Sampling(seed=4), Wanted(NEW))

    events = run(decoder, [job])
    handle.remove()
    events += run(decoder, [alone])

    assert seen.count(len(prompt)) == 1
    assert made(events, job) == made(events, alone)
    assert made(events, job, 1) != made(events, job, 2)


def test_an_end_token_ends_an_answer(llama: Small) -> None:
    expected = llama.expected(llama.prompts[0])
    end = expected[-1]
    job = Job(tuple(llama.prompts[0]), GREEDY, Wanted(NEW, ends=frozenset({end})))

    events = run(decoder_of(llama.split), [job])

    assert made(events, job) == expected[: expected.index(end) + 1]
    assert isinstance(events[-1], TokenMade)
    assert events[-1].finish == "stop"


def test_who_is_not_wanted_any_more_leaves_and_its_caches_with_it(llama: Small) -> None:
    decoder = decoder_of(llama.split)
    gone, stays = (Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1))
    decoder.take([gone, stays])
    events = decoder.prefill()
    assert gone.continuations[0].lane is not None

    gone.continuations[0].unwanted = True
    events += run(decoder, [])

    assert gone.continuations[0].lane is None
    assert len(made(events, gone)) == 1
    assert made(events, stays) == llama.expected(llama.prompts[1])


def test_a_prompt_that_is_not_wanted_any_more_is_not_run_on(llama: Small) -> None:
    decoder = decoder_of(llama.split, piece=4)
    job = Job(tuple(llama.prompts[3]), GREEDY, Wanted(NEW))
    decoder.take([job])
    decoder.prefill()

    job.continuations[0].unwanted = True

    assert decoder.prefill() == []
    assert job.lane is None
    assert decoder.is_idle


@pytest.mark.parametrize("piece", [512, 4])
def test_the_tokens_of_a_prompt_are_told_of(llama: Small, piece: int) -> None:
    prompt = llama.prompts[3]
    with torch.inference_mode():
        expected = llama.unsplit(torch.tensor([prompt])).logits[0].log_softmax(-1)
    job = Job(tuple(prompt), GREEDY, Wanted(0, logprobs=2, prompt_logprobs=True))

    told, nothing = run(decoder_of(llama.split, piece), [job])

    assert isinstance(told, PromptTold)
    assert isinstance(nothing, NothingMade)
    assert [one.token for one in told.told] == prompt[1:]
    assert [one.logprob for one in told.told] == pytest.approx(
        [float(expected[place, token]) for place, token in enumerate(prompt[1:])], abs=1e-5
    )
    assert [one.top[0][0] for one in told.told] == expected[:-1].argmax(-1).tolist()


def test_a_forward_that_fails_ends_those_that_it_fails_for(llama: Small) -> None:
    bad, good = (Job(tuple(llama.prompts[n]), GREEDY, Wanted(NEW)) for n in (0, 1))
    decoder = decoder_of(llama.split)
    decoder.take([bad, good])
    events = decoder.prefill()
    bad.continuations[0].lane.caches[1].layers[2].keys = "no tensor"

    events += run(decoder, [])

    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.job for event in failed] == [bad]
    assert isinstance(failed[0].error, GenerationFailedError)
    assert failed[0].error.__cause__ is not None
    assert failed[0].error.__cause__.__traceback__ is None
    assert made(events, good) == llama.expected(llama.prompts[1])


def test_numbers_that_are_none_end_an_answer(llama: Small) -> None:
    job = Job(tuple(llama.prompts[0]), GREEDY, Wanted(NEW))
    decoder = decoder_of(llama.split)
    decoder.take([job])
    decoder.prefill()
    cache = job.continuations[0].lane.caches[2]
    with torch.inference_mode():
        cache.layers[4].values.fill_(float("nan"))

    events = decoder.step()

    assert [type(event) for event in events] == [Failed]
    assert decoder.is_idle
