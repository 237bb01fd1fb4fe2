"""`splitlearn generate`: text from a model in this process, its Trunk elsewhere or not."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from splitlearn_manager.commands import speakers
from splitlearn_manager.commands.errors import FAILED
from splitlearn_manager.commands.options import (
    Adapter,
    AllowUncertified,
    AsJson,
    CacheDir,
    MiniMind,
    OptionalModelName,
    OptionalSplitPoints,
    Revision,
    ServedDType,
)
from splitlearn_manager.errors import ConfigError

STANDARD_INPUT = "-"


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to go on from; -: standard input.")
    ],
    model: OptionalModelName = None,
    config: speakers.ConfigFile = None,
    configured: speakers.ConfiguredModel = None,
    split_points: OptionalSplitPoints = None,
    trunk: speakers.TrunkAddress = None,
    trunk_model_id: speakers.TrunkModelId = None,
    chain: speakers.ChainLink = None,
    token_env: speakers.TokenEnv = None,
    token_file: speakers.TokenFile = None,
    ca_file: speakers.CaFile = None,
    max_new_tokens: speakers.MaxNewTokens = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: speakers.TopK = None,
    top_p: speakers.TopP = None,
    seed: speakers.Seed = None,
    prompt_lookup: speakers.PromptLookup = None,
    assistant: speakers.Assistant = None,
    dtype: ServedDType = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0, … or mps.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Pack linear layers: prepacked, fp16 or int8.")
    ] = None,
    adapter: Adapter = None,
    minimind: MiniMind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_uncertified: AllowUncertified = False,
    threads: speakers.Threads = None,
    timings: Annotated[
        bool, typer.Option("--timings", help="Say where the time of a token went.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate text, printing as it goes; then say how fast, and where each part ran.

    `splitlearn generate MODEL --trunk http://host:8000 --prompt "…"` has Bottom and Top here, and
    asks the Trunk where the model is cut.  Without --trunk or --config all of it is here.
    """
    speakers.check_sampling(temperature, top_k, top_p)
    speakers.check_speculation(prompt_lookup, assistant)
    named = speakers.Named(
        model=model,
        config=config,
        model_id=configured,
        split_points=split_points,
        trunk=trunk,
        trunk_model_id=trunk_model_id,
        chain=chain,
        token_env=token_env,
        token_file=token_file,
        ca_file=ca_file,
        dtype=dtype,
        device=device,
        quantization=quantization,
        adapter=adapter,
        minimind=minimind,
        revision=revision,
        cache_dir=cache_dir,
        allow_uncertified=allow_uncertified,
        threads=threads,
    )
    try:
        settings, chosen = named.find()
        text = _read_prompt(prompt)

        from splitlearn_manager.generate import GenerateOptions, generate_text  # noqa: PLC0415

        speakers.quiet_transformers()

        options = GenerateOptions(
            max_new_tokens, temperature, top_k, top_p, seed, prompt_lookup, assistant
        )
        told = timings or as_json
        result = generate_text(settings, chosen, text, options, echo=not as_json, timings=told)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        sys.stderr.write(f"splitlearn: {error}\n")
        raise typer.Exit(FAILED) from error
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        sys.stderr.write(f"\n{result.summary(timings=timings)}\n")


def _read_prompt(prompt: str) -> str:
    """Return the prompt; `-` is what comes on standard input, but for its last line's end."""
    return sys.stdin.read().removesuffix("\n") if prompt == STANDARD_INPUT else prompt
