"""The command line.

Nothing heavy is imported before a command knows that it needs it, so that `--help` and errors in a
configuration come at once.  Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from splitlearn_manager.commands.architectures import list_architectures
from splitlearn_manager.commands.bench import bench
from splitlearn_manager.commands.options import SplitPointsCommand
from splitlearn_manager.commands.plan import plan
from splitlearn_manager.commands.split import split
from splitlearn_manager.commands.verify import verify
from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig

app = typer.Typer(
    name="splitlearn",
    help="Split Hugging Face decoders; serve the middle, keep the ends at home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("architectures")(list_architectures)
app.command("bench")(bench)
app.command("plan", cls=SplitPointsCommand)(plan)
app.command("split", cls=SplitPointsCommand)(split)
app.command("verify", cls=SplitPointsCommand)(verify)

WRONG_USAGE = 2

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The daemon's YAML.")]


def main() -> None:
    """Run the command line; the console script `splitlearn`."""
    try:
        app()
    except ConfigError as error:
        sys.stderr.write(f"splitlearn: {error}\n")
        sys.exit(WRONG_USAGE)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from splitlearn_core import __version__  # noqa: PLC0415

        typer.echo(f"splitlearn {__version__}")
        raise typer.Exit


@app.command()
def serve(
    config: ConfigFile,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Run the daemon: load the configured models and serve them until SIGTERM.

    SIGHUP reads the file again.
    """
    given = {"host": host, "port": port, "log_level": log_level, "log_format": log_format}
    server = {key: value for key, value in given.items() if value is not None}
    settings = _read(config, {"server": server})

    from splitlearn_manager.preflight import check_checkpoints  # noqa: PLC0415
    from splitlearn_manager.server.daemon import run  # noqa: PLC0415 - needs torch

    def reread() -> DaemonConfig:
        newer = _read(config, {"server": server})
        check_checkpoints(newer.models, str(config))
        return newer

    check_checkpoints(settings.models, str(config))
    _end_process(run(settings, reread))


@app.command()
def generate(
    config: ConfigFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from.")],
    model: Annotated[
        str | None, typer.Option(help="Which model of the file, where it has several.")
    ] = None,
    trunk: Annotated[
        list[str] | None,
        typer.Option(help="Address of the Trunk, instead of the file's; repeat for several."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to make.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Choose among this much probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate text with a model of a configuration, in this process, printing as it goes."""
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ConfigError(
            "--top-k and --top-p choose at random, which needs a --temperature above 0"
        )
    settings = _read(config, {})
    chosen = _choose(settings, model, str(config))
    if trunk:
        chosen = _with_trunk(chosen, trunk)

    from splitlearn_manager.generate import GenerateOptions, generate_text  # noqa: PLC0415
    from splitlearn_manager.preflight import check_checkpoints  # noqa: PLC0415

    check_checkpoints([chosen], str(config))
    options = GenerateOptions(max_new_tokens, temperature, top_k, top_p, seed)
    try:
        result = generate_text(settings, chosen, prompt, options, echo=not as_json)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"splitlearn: {error}\n")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        sys.stderr.write(f"\n{result.summary()}\n")


def _end_process(code: int) -> NoReturn:
    """End now: taking torch down takes seconds, which a daemon's drain time has no room for."""
    logging.shutdown()
    with suppress(OSError, ValueError):  # nobody may be reading any more
        sys.stdout.flush()
    os._exit(code)


def _read(path: Path, overrides: dict[str, Any]) -> DaemonConfig:
    """Read a configuration, and check all of it that needs no torch."""
    from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415
    from splitlearn_manager.preflight import check_shapes  # noqa: PLC0415

    settings = DaemonConfig.from_yaml(path, overrides=overrides)
    check_shapes(settings.models, str(path))
    return settings


def _choose(settings: DaemonConfig, model_id: str | None, source: str) -> ModelConfig:
    """Return the model to generate with: the one that is named, or the only one."""
    ids = [model.model_id for model in settings.models]
    if model_id is None and len(ids) == 1:
        return settings.models[0]
    if model_id not in ids:
        wanted = "name one with --model" if model_id is None else f"there is no {model_id!r}"
        raise ConfigError(f"{source}: {wanted}; the models are {', '.join(ids) or '(none)'}")
    return settings.models[ids.index(model_id)]


def _with_trunk(config: ModelConfig, addresses: list[str]) -> ModelConfig:
    """Return a pipeline's configuration with other addresses for its Trunk."""
    from splitlearn_manager.config.model_config import PIPELINE, ModelConfig  # noqa: PLC0415

    if config.model_type != PIPELINE or "chain" in config.config:
        raise ConfigError(f"--trunk needs a pipeline with one Trunk; {config.model_id} is none")
    return ModelConfig.from_dict(
        config.to_dict() | {"config": {**config.config, "trunk": addresses}}
    )
