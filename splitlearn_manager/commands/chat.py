"""`splitlearn chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from splitlearn_manager.commands import speakers
from splitlearn_manager.commands.errors import FAILED
from splitlearn_manager.commands.options import (
    Adapter,
    AllowUncertified,
    CacheDir,
    MiniMind,
    OptionalModelName,
    OptionalSplitPoints,
    Revision,
    ServedDType,
)
from splitlearn_manager.errors import ConfigError


def chat(
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
    system: Annotated[
        str | None, typer.Option(help="What the model is told before all else.")
    ] = None,
    max_new_tokens: speakers.MaxNewTokens = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0: the likeliest token each time; default: the model's own."),
    ] = None,
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
) -> None:
    """Talk with a model; only its hidden states go to the Trunk.

    `splitlearn chat MODEL --trunk http://host:8000` has Bottom and Top here.  Ctrl-C stops an
    answer, Ctrl-D or /quit ends the program, /help lists the commands.  Piped in, each line is a
    turn, and only the answers come out.
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

        from splitlearn_manager.chat import Terminal, talk  # noqa: PLC0415 - needs torch
        from splitlearn_manager.conversation import Conversation  # noqa: PLC0415
        from splitlearn_manager.generate import GenerateOptions  # noqa: PLC0415
        from splitlearn_manager.language_model import open_language_model  # noqa: PLC0415

        speakers.quiet_transformers()

        options = GenerateOptions(
            max_new_tokens, temperature, top_k, top_p, seed, prompt_lookup, assistant
        )
        with open_language_model(settings, chosen, timings=True) as speaker:
            code = talk(Conversation(speaker, options, system), Terminal(sys.stdin, sys.stdout))
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        sys.stderr.write(f"splitlearn: {error}\n")
        raise typer.Exit(FAILED) from error
    raise typer.Exit(code)
