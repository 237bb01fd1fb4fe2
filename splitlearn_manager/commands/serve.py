"""`splitlearn serve`: the daemon, from a YAML file or for one model."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from splitlearn_core.plan import FULL, TRUNK
from splitlearn_manager.commands.errors import told_in_one_line
from splitlearn_manager.commands.options import (
    Adapter,
    AllowEmpty,
    AllowUncertified,
    CacheDir,
    MiniMind,
    OptionalModelName,
    OptionalSplitPoints,
    Revision,
    ServedDType,
    parse_minimind,
    parse_points,
)
from splitlearn_manager.commands.reading import check_shapes_of, read_daemon_config
from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from splitlearn_manager.config.daemon_config import DaemonConfig

_NO_WORD = re.compile(r"[^A-Za-z0-9._-]+")


def serve(
    model: OptionalModelName = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The daemon's YAML, instead of MODEL.")
    ] = None,
    split_points: OptionalSplitPoints = None,
    component: Annotated[
        str | None,
        typer.Option(help="What of MODEL: trunk (every Trunk), trunk-0, bottom, top or full."),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The name that it is served by; default: the component's.")
    ] = None,
    dtype: ServedDType = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0, … or mps.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Pack linear layers: prepacked, fp16 or int8.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that clients need.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with it, instead.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    adapter: Adapter = None,
    minimind: MiniMind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_empty: AllowEmpty = False,
    allow_uncertified: AllowUncertified = False,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Run the daemon until SIGTERM: what a YAML file says, or the Trunk of one model.

    `splitlearn serve MODEL --split 8,24` serves the layers 8 to 23 as `trunk`, for
    `splitlearn chat MODEL --trunk http://127.0.0.1:8000`.

    With --config, SIGHUP reads the file again.
    """
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "token_env": token_env,
        "token_file": None if token_file is None else str(token_file),
        "threads": threads,
        "log_level": log_level,
        "log_format": log_format,
    }
    server = {key: value for key, value in given.items() if value is not None}
    part = {
        "--split": split_points,
        "--component": component,
        "--model-id": model_id,
        "--dtype": dtype,
        "--device": device,
        "--quantization": quantization,
        "--adapter": adapter,
        "--minimind": minimind or None,
        "--revision": revision,
        "--cache-dir": cache_dir,
        "--allow-empty": allow_empty or None,
        "--allow-uncertified": allow_uncertified or None,
    }
    if (model is None) == (config is None):
        raise ConfigError("give a MODEL with --split, or --config FILE")
    if config is not None:
        if named := [name for name, value in part.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(named)}: with --config, the file says what is served, and how"
            )
        _serve_file(config, server)
    elif model is not None:
        with told_in_one_line():
            points = None if split_points is None else parse_points(split_points)
            told = parse_minimind(minimind)
        options: dict[str, Any] = {
            "quantization": quantization,
            "adapter": adapter,
            "minimind": told,
            "revision": revision,
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "allow_empty": allow_empty,
            "allow_uncertified": allow_uncertified,
        }
        loading = {"model_path": model, "dtype": dtype, "device": device or "cpu", "warmup": True}
        models = [
            {"model_id": name, **loading, "config": {**options, "component": which, **cuts}}
            for name, which, cuts in _served(model, points, component, model_id)
        ]
        _serve_model(model, {"server": server, "models": models})


def _served(
    model: str, points: tuple[int, ...] | None, component: str | None, model_id: str | None
) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what is served: id, component and the cuts, of each."""
    if component == FULL:
        last = re.split(r"[/:\\]", model.rstrip("/\\"))[-1]
        return [(model_id or _NO_WORD.sub("-", last).strip("-.") or FULL, FULL, {})]
    if points is None:
        raise ConfigError(
            f"--split is needed: the layers where {model} is cut, as in --split 8,24; or"
            " --component full serves all of it"
        )
    cuts = {"split_points": list(points)}
    several = len(points) - 1
    if component in {None, TRUNK} and several > 1:
        if model_id is not None:
            raise ConfigError(f"--model-id names one model, and {several} Trunks are served")
        return [(f"{TRUNK}-{n}", f"{TRUNK}-{n}", cuts) for n in range(several)]
    name = component or TRUNK
    return [(model_id or name, name, cuts)]


def _serve_file(path: Path, server: dict[str, Any]) -> None:
    """Serve what a file says."""
    settings = read_daemon_config(path, {"server": server})

    from splitlearn_manager.preflight import check_checkpoints  # noqa: PLC0415

    def reread() -> DaemonConfig:
        newer = read_daemon_config(path, {"server": server})
        check_checkpoints(newer.models, str(path))
        return newer

    check_checkpoints(settings.models, str(path))

    from splitlearn_manager.server.daemon import run  # noqa: PLC0415 - needs torch

    _end_process(run(settings, reread))


def _serve_model(model: str, settings: dict[str, Any]) -> None:
    """Serve parts of one model."""
    from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415 - slow

    config = DaemonConfig.from_dict(settings)
    check_shapes_of(config.models, None)

    from splitlearn_core.part_manifest import MANIFEST_FILE  # noqa: PLC0415 - slow
    from splitlearn_manager.preflight import check_checkpoints  # noqa: PLC0415
    from splitlearn_manager.server.daemon import run  # noqa: PLC0415 - needs torch

    check_checkpoints(config.models, None)
    names = ", ".join(m.model_id for m in config.models)
    hint = f"splitlearn: to serve {names} of {model}"
    if config.server.port and all(m.part.component != FULL for m in config.models):
        scheme, host = "http", config.server.host
        here = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared
        address = f"{scheme}://{f'[{here}]' if ':' in here else here}:{config.server.port}"
        whole = "MODEL" if (Path(model) / MANIFEST_FILE).is_file() else shlex.quote(model)
        hint += f"; to chat, once it is ready: splitlearn chat {whole} --trunk {address}"
    sys.stderr.write(f"{hint}\n")
    _end_process(run(config))


def _end_process(code: int) -> NoReturn:
    """End now: taking torch down takes seconds, which a daemon's drain time has no room for."""
    logging.shutdown()
    with suppress(OSError, ValueError):  # nobody may be reading any more
        sys.stdout.flush()
    os._exit(code)
