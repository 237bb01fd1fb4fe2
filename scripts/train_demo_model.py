"""Train the built-in demonstration model from the text that comes with Python itself.

The text is the standard library's docstrings, comments and help topics, read from the Python
that runs this script; none of it is kept.  From it come a byte-level BPE tokenizer, a small
Llama-shaped model and a model note, written as an ordinary Hugging Face folder::

    .venv/bin/python scripts/train_demo_model.py --out splitlearn_core/builtin/demo

One source file in about twenty is held out by its name, never trained on, and used for the two
figures of the note: the loss of the saved model and that of a unigram model.  At one thread the
result depends on the Python and package versions and on the processor, and on nothing else.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import platform
import random
import re
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

logger = logging.getLogger("train_demo_model")

SEED = 20240229
VOCAB_SIZE = 4096
CONTEXT = 512
STEP_TOKENS = 4 * CONTEXT
# Most texts are short, and short windows train faster; the rest of the steps, at full length,
# teach the later positions.
SHORT_WINDOW = 128
SHORT_SHARE = 0.7
QUESTION_ONE_IN = 2
PEAK_LEARNING_RATE = 2.5e-3
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
HELD_OUT_ONE_IN = 20
SAMPLE_PROMPTS = ("Return the", "The function returns", "If the file")

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
SYSTEM_MESSAGE = "You answer questions about Python."
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, not ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Tests hold much that is not English prose, `encodings` is tables in many languages, and the
# generated `_sysconfigdata*` modules hold paths of the machine that built this Python.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "_bundled")
MIN_TEXT_CHARS = 24
MIN_LETTER_SHARE = 0.78
MAX_ANSWER_CHARS = 300


# --- the text ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One training conversation: a question about a name, and its docstring's first sentence."""

    question: str
    answer: str


@dataclass
class Source:
    """All the text of one file, help topic or built-in module, under a name that never varies."""

    name: str
    texts: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        """Whether this source is kept for evaluation; its name alone decides."""
        return is_held_out(self.name)


def is_held_out(name: str) -> bool:
    """Whether the source called ``name`` belongs to the evaluation split, on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def gather() -> list[Source]:
    """Return every source of text that this Python has, sorted by name."""
    sources = [*file_sources(stdlib_root()), *topic_sources(), *builtin_sources()]
    return sorted(sources, key=lambda source: source.name)


def stdlib_root() -> Path:
    """Return the folder of the standard library, also from within a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def file_sources(root: Path) -> Iterator[Source]:
    """Yield the docstrings and comments of each ``.py`` file under ``root``.

    Files that are not UTF-8 or not valid Python of this version are passed over: the standard
    library has a few on purpose.
    """
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _is_skipped(name):
            continue
        try:
            code = path.read_text(encoding="utf-8")
            yield file_source(name, code)
        except (UnicodeDecodeError, SyntaxError):
            logger.info("passed over %s: not readable as Python", name)


def _is_skipped(name: str) -> bool:
    parts = name.split("/")
    return any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in parts)


def file_source(name: str, code: str) -> Source:
    """Return the prose and the questions of one Python file.

    Raises :class:`SyntaxError` when ``code`` is not Python.
    """
    source = Source(name)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for qualified, is_function, doc in docstrings(ast.parse(code), module):
        _add(source, qualified, is_function, doc)
    source.texts += [text for text in map(prose, comments(code)) if text]
    return source


def docstrings(node: ast.AST, qualified: str) -> Iterator[tuple[str, bool, str]]:
    """Yield ``(qualified name, is it a function, docstring)`` of ``node`` and all below it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield qualified, isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), doc
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
        yield from docstrings(child, f"{qualified}.{name}" if name else qualified)


def comments(code: str) -> Iterator[str]:
    """Yield each run of whole-line comments in ``code`` as one text, without the ``#``."""
    run: list[str] = []
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if run and token.start[0] != last_line + 1:
            yield "\n".join(run)
            run = []
        run.append(re.sub(r"^#+ ?", "", token.string))
        last_line = token.start[0]
    yield "\n".join(run)


def topic_sources() -> Iterator[Source]:
    """Yield the texts that ``help("TOPIC")`` prints, a source for each topic."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in topics.items():
        paragraphs = prose(text)
        yield Source(f"topics:{topic}", [paragraphs] if paragraphs else [])


def builtin_sources() -> Iterator[Source]:
    """Yield the docstrings of the modules that are compiled into the interpreter."""
    for module_name in sorted(sys.builtin_module_names):
        module = importlib.import_module(module_name)
        source = Source(f"builtin:{module_name}")
        for qualified, value in sorted(_members(module), key=lambda item: item[0]):
            doc = getattr(value, "__doc__", None)
            if isinstance(doc, str):
                _add(source, qualified, inspect.isroutine(value), doc)
        yield source


def _members(module: object) -> Iterator[tuple[str, object]]:
    """Yield the public members of ``module`` and of its classes, with their dotted names."""
    module_name = getattr(module, "__name__", "")
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        yield f"{module_name}.{name}", value
        if inspect.isclass(value):
            for attribute, inner in vars(value).items():
                if not attribute.startswith("__"):
                    yield f"{module_name}.{name}.{attribute}", inner


def _add(source: Source, qualified: str, is_function: bool, doc: str) -> None:
    """Add what ``doc`` holds of prose to ``source``, and a question about it."""
    text = prose(doc)
    if not text:
        return
    source.texts.append(text)
    answer = first_sentence(text)
    if answer:
        verb = f"What does {qualified} do?" if is_function else f"What is {qualified}?"
        source.questions.append(Question(verb, answer))


def prose(text: str) -> str:
    """Return the English paragraphs of ``text``: no doctests, tables or code, only ASCII."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    kept = "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if _is_prose(paragraph))
    return kept if len(kept) >= MIN_TEXT_CHARS else ""


def _is_prose(paragraph: str) -> bool:
    if not paragraph.isascii() or ">>>" in paragraph or " " not in paragraph.strip():
        return False
    letters = sum(char.isalpha() or char.isspace() for char in paragraph)
    return letters / len(paragraph) >= MIN_LETTER_SHARE


def first_sentence(text: str) -> str:
    """Return the first sentence of ``text`` on one line, or nothing when it is too long."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph, maxsplit=1)[0]
    return sentence if MIN_TEXT_CHARS <= len(sentence) <= MAX_ANSWER_CHARS else ""


@dataclass
class Corpus:
    """The texts after the split; no text is in both halves, nor twice in one."""

    train: list[str]
    held_out: list[str]
    questions: list[Question]
    train_sources: int
    held_out_sources: int


def split(sources: Sequence[Source]) -> Corpus:
    """Split ``sources`` into training and held-out texts.

    A text that both have (a docstring copied from one file to another) stays in training only,
    so that the held-out figures are about text that was never seen.
    """
    seen: set[str] = set()

    def take(chosen: Iterable[Source]) -> list[str]:
        texts = []
        for text in itertools.chain.from_iterable(source.texts for source in chosen):
            if text not in seen:
                seen.add(text)
                texts.append(text)
        return texts

    kept = [source for source in sources if source.texts and not source.held_out]
    held = [source for source in sources if source.texts and source.held_out]
    questions = [question for source in kept for question in source.questions]
    return Corpus(take(kept), take(held), questions[::QUESTION_ONE_IN], len(kept), len(held))


# --- the tokenizer ----------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``; any text round-trips through it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return ``<s> text </s>`` as token ids for each text."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def encode_questions(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> list[list[int]]:
    """Return each question with its answer as the chat template writes them, as token ids."""
    rendered = [
        tokenizer.apply_chat_template(_messages(question, number % 8 == 0), tokenize=False)
        for number, question in enumerate(questions)
    ]
    encoded: list[list[int]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return encoded


def _messages(question: Question, with_system: bool) -> list[dict[str, str]]:
    system = [{"role": "system", "content": SYSTEM_MESSAGE}] if with_system else []
    return [
        *system,
        {"role": "user", "content": question.question},
        {"role": "assistant", "content": question.answer},
    ]


# --- the model and its training ---------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained float32 model: 8 layers, grouped key-value heads, tied head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(documents: Sequence[Sequence[int]], steps: int) -> Iterator[torch.Tensor]:
    """Yield ``steps`` times ``STEP_TOKENS`` tokens: the documents in a row, cut to windows.

    Each is int64 ``[windows, length + 1]``, short windows first, then those of full length.
    """
    stream = token_stream(documents, random.Random(SEED))  # noqa: S311 - repeatable on purpose
    for step in range(steps):
        length = SHORT_WINDOW if step < SHORT_SHARE * steps else CONTEXT
        chunk = torch.tensor(list(itertools.islice(stream, STEP_TOKENS + 1)))
        yield chunk.unfold(0, length + 1, length)


def token_stream(documents: Sequence[Sequence[int]], rng: random.Random) -> Iterator[int]:
    """Yield the tokens of all documents without end, each pass in a new order."""
    order = list(documents)
    while True:
        rng.shuffle(order)
        yield from itertools.chain.from_iterable(order)


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    """Return the schedule: linear warm-up, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, round(steps * WARMUP_SHARE))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats over int64 ``windows`` of shape [batch, seq]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model: LlamaForCausalLM, documents: Sequence[Sequence[int]], steps: int) -> None:
    """Train ``model`` in place for ``steps`` steps of ``STEP_TOKENS`` tokens."""
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(steps))
    started = time.monotonic()
    model.train()
    for step, windows in enumerate(batches(documents, steps)):
        loss = token_loss(model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            logger.info("step %d of %d, loss %.3f, %.0f s", step, steps, loss.item(), elapsed)
    model.eval()


# --- the figures ------------------------------------------------------------------------------


@torch.no_grad()
def model_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Return the mean loss in nats per token, each document on its own, cut at ``CONTEXT``."""
    nats, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([document[:CONTEXT]])
        nats += token_loss(model, ids).item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nats / tokens


def unigram_loss(
    train_documents: Iterable[Sequence[int]], held_out: Sequence[Sequence[int]]
) -> float:
    """Return the loss that token frequencies alone reach on what :func:`model_loss` predicts.

    Frequencies are those of ``train_documents`` with one added to each; ``<s>``, which opens a
    document and is never predicted, counts in neither.
    """
    counts = Counter(itertools.chain.from_iterable(doc[1:] for doc in train_documents))
    total = sum(counts.values()) + VOCAB_SIZE
    targets = Counter(itertools.chain.from_iterable(doc[1:CONTEXT] for doc in held_out))
    nats = sum(n * -math.log((counts[token] + 1) / total) for token, n in targets.items())
    return nats / sum(targets.values())


@torch.no_grad()
def continue_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return ``prompt`` and what the model makes of it, greedily, in at most 48 tokens."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)  # type: ignore[misc]
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


# --- the folder -------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer to ``out``: float16 safetensors and ordinary JSON."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.float16).save_pretrained(out)  # type: ignore[arg-type]
    tokenizer.save_pretrained(out, save_jinja_files=False)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _make_portable(out / "config.json")
    _make_portable(out / "tokenizer_config.json")


def _make_portable(path: Path) -> None:
    """Rewrite saved JSON without folders of this machine, with names that all readers know.

    transformers 5 writes its own class name and ``extra_special_tokens`` as a list; releases
    before it, and other programs, read the older spellings, which transformers 5 reads too.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "name_or_path", "is_local", "backend"):
        values.pop(key, None)
    if "tokenizer_class" in values:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        values["additional_special_tokens"] = values.pop("extra_special_tokens", [])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


NOTE = Template("""\
---
language: en
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
---

# SplitLearn's demonstration model

A Llama-shaped language model of $parameters parameters ($layers layers, hidden size $hidden,
$heads attention heads over $kv_heads key-value heads, tied head, $context positions), with its
own byte-level BPE tokenizer of $vocab tokens.
It is small enough to come with the package, so that a model can be split, served and generated
with before anything is downloaded.  In configurations it is called `builtin:demo`.

It is for demonstration and tests only.  What it writes looks like Python documentation and means
nothing: never rely on it.

## Text

The standard library's docstrings and comments, the docstrings of the built-in modules and the
help topics of `pydoc`, read from Python $python; test packages, doctests, tables and code are
left out, and so is what is not ASCII.  The text itself is not part of this folder.

| | sources | texts | tokens |
|---|---|---|---|
| training | $train_sources | $train_texts | $train_tokens |
| training, as question and answer | | $chat_texts | $chat_tokens |
| held out | $held_sources | $held_texts | $held_tokens |

Questions are made from docstrings ("What does shutil.move do?", with its first sentence as the
answer), so that the chat template (`system`, `user`, `assistant`) means something.
One source in about $one_in is held out; the hash of its name decides, and a text that is also in
a training source is taken out of the held-out half.

## Held-out loss

In nats per token, over $held_targets predicted tokens, each text on its own, cut at $context:

| | held-out loss |
|---|---|
| this model, as saved in float16, run in float32 | $model_loss |
| unigram model (training frequencies, one added to each) | $unigram_loss |

Greedy continuations in float32:

$samples

## Training

AdamW, $steps steps of $step_tokens tokens ($passes passes over the training text), first in
windows of $short_window tokens, then of $context; peak learning rate $learning_rate with linear
warm-up and cosine decay, weight decay $weight_decay, gradient norm clipped at $clip; float32 on a
CPU, $threads thread(s), $minutes minutes of wall time.
Random seed $seed; torch $torch, transformers $transformers, tokenizers $tokenizers.

To make it again: `.venv/bin/python scripts/train_demo_model.py --steps $steps`.  Another version
of Python has other docstrings, so the result differs a little.

`model.safetensors` has $bytes bytes, SHA-256 `$sha256`.

## Licence

The text it learned from is part of Python and its documentation, under the Python Software
Foundation License Version 2 (https://docs.python.org/3/license.html), Copyright (c) Python
Software Foundation.
""")


@dataclass(frozen=True)
class Run:
    """What the model note tells of one training run."""

    corpus: Corpus
    texts: list[list[int]]
    chats: list[list[int]]
    held_out: list[list[int]]
    steps: int
    threads: int
    minutes: float

    @property
    def passes(self) -> float:
        """How often each training token was seen."""
        return self.steps * STEP_TOKENS / (token_count(self.texts) + token_count(self.chats))


def token_count(documents: Iterable[Sequence[int]]) -> int:
    """Return the number of tokens in ``documents``."""
    return sum(map(len, documents))


def write_note(out: Path, run: Run) -> None:
    """Measure the model saved in ``out``, as saved, and write its ``README.md`` there."""
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, local_files_only=True
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, local_files_only=True)
    samples = "\n".join(
        "> " + " ".join(continue_text(model, tokenizer, prompt).split()) + "\n"
        for prompt in SAMPLE_PROMPTS
    )
    weights = (out / "model.safetensors").read_bytes()
    figures = {
        "bytes": f"{len(weights):,}",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "model_loss": f"{model_loss(model, run.held_out):.3f}",
        "unigram_loss": f"{unigram_loss(run.texts, run.held_out):.3f}",
        "parameters": f"{model.num_parameters():,}",
        "samples": samples.rstrip(),
    }
    logger.info("held-out loss %(model_loss)s, unigram %(unigram_loss)s", figures)
    note = NOTE.substitute(figures | _shape(model.config) | _text_figures(run) | _how(run))
    (out / "README.md").write_text(note, encoding="utf-8")


def _shape(config: LlamaConfig) -> dict[str, str]:
    return {
        "layers": str(config.num_hidden_layers),
        "hidden": str(config.hidden_size),
        "heads": str(config.num_attention_heads),
        "kv_heads": str(config.num_key_value_heads),
        "vocab": f"{config.vocab_size:,}",
        "context": str(config.max_position_embeddings),
    }


def _text_figures(run: Run) -> dict[str, str]:
    counts = {
        "train_sources": run.corpus.train_sources,
        "train_texts": len(run.texts),
        "train_tokens": token_count(run.texts),
        "chat_texts": len(run.chats),
        "chat_tokens": token_count(run.chats),
        "held_sources": run.corpus.held_out_sources,
        "held_texts": len(run.held_out),
        "held_tokens": token_count(run.held_out),
        "held_targets": sum(min(len(doc), CONTEXT) - 1 for doc in run.held_out),
        "one_in": HELD_OUT_ONE_IN,
    }
    return {name: f"{count:,}" for name, count in counts.items()}


def _how(run: Run) -> dict[str, str]:
    return {
        "steps": str(run.steps),
        "step_tokens": f"{STEP_TOKENS:,}",
        "short_window": str(SHORT_WINDOW),
        "passes": f"{run.passes:.1f}",
        "learning_rate": str(PEAK_LEARNING_RATE),
        "weight_decay": str(WEIGHT_DECAY),
        "clip": str(MAX_GRADIENT_NORM),
        "threads": str(run.threads),
        "minutes": f"{run.minutes:.0f}",
        "seed": str(SEED),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


# --- the command ------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; ``None`` takes it from ``sys.argv``."""
    default_out = Path(__file__).resolve().parents[1] / "splitlearn_core" / "builtin" / "demo"
    parser = argparse.ArgumentParser(description="Train the built-in demonstration model.")
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write")
    parser.add_argument("--steps", type=_positive, default=1300, help="optimizer steps")
    parser.add_argument("--threads", type=_positive, default=1, help="threads that torch uses")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather the text, train tokenizer and model, save them, and measure what was saved."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    corpus = split(gather())
    tokenizer = train_tokenizer(corpus.train)
    texts = encode_texts(tokenizer, corpus.train)
    chats = encode_questions(tokenizer, corpus.questions)
    held_out = encode_texts(tokenizer, corpus.held_out)
    logger.info("%d training tokens", token_count(texts) + token_count(chats))
    model = build_model(tokenizer)
    logger.info("%d parameters", model.num_parameters())
    started = time.monotonic()
    train(model, [*texts, *chats], options.steps)
    minutes = (time.monotonic() - started) / 60
    save(model, tokenizer, options.out)
    run = Run(corpus, texts, chats, held_out, options.steps, options.threads, minutes)
    write_note(options.out, run)


if __name__ == "__main__":
    main()
