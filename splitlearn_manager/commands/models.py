"""`splitlearn models`: see and change the models of a daemon, here or elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteError, RemoteUnavailable
from splitlearn_manager.client.management import DaemonEvent, ManagementClient
from splitlearn_manager.client.watching import AWAY, Watch
from splitlearn_manager.commands.errors import FAILED, WRONG_USAGE
from splitlearn_manager.commands.tables import layers, table
from splitlearn_manager.config.secrets import read_token
from splitlearn_manager.config.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

app = typer.Typer(help="See and change the models of a daemon.", no_args_is_help=True)

DEFAULT_URL = "http://127.0.0.1:8000"

# The daemon understood, and will say the same the next time.
_USAGE = frozenset({"bad_request", "unauthorized", "forbidden", "model_not_found"})

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.")]
Url = Annotated[str, typer.Option(help="The daemon's address.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the daemon's token.")]
TokenEnv = Annotated[str | None, typer.Option(help="Environment variable with it, instead.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[bool, typer.Option(" /--no-wait", help="Return at once.", show_default=False)]


@app.command("list")
def list_models(
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    as_json: AsJson = False,
) -> None:
    """List every model that is there, or configured."""
    with _client(url, token_file, token_env) as client:
        models = client.models()
    if as_json:
        typer.echo(json.dumps({"models": models}))
        return
    heading = ("model", "state", "part", "layers", "device", "dtype", "memory", "KV", "in use", "")
    typer.echo(table([heading, *map(_row, models)], left=10))


@app.command()
def load(
    model: Model,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Load a model that the daemon's configuration names, and wait until it is ready."""
    with _client(url, token_file, token_env) as client:
        _begin_and_watch(client, model, "load", {}, wait=wait, as_json=as_json)


@app.command()
def reload(
    model: Model,
    policy: Annotated[
        str | None, typer.Option(help="load_first or unload_first; default: as configured.")
    ] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Load a model anew, swap it for the old one between two requests, drain that."""
    options = {} if policy is None else {"policy": policy}
    with _client(url, token_file, token_env) as client:
        _begin_and_watch(client, model, "reload", options, wait=wait, as_json=as_json)


@app.command()
def unload(
    model: Model,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds for what is in flight; default: the daemon's.")
    ] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Drain and unload a model, and wait until it is gone."""
    options = {} if drain_timeout is None else {"drain_timeout": drain_timeout}
    with _client(url, token_file, token_env) as client:
        if wait:
            state = client.finish(model, "unload", **options)
        else:
            _, state = client.begin(model, "unload", **options)
    missing = state.get("unreturned_bytes", 0)
    _say(state, as_json=as_json, more=f", {format_bytes(missing)} not back" if missing else "")


@app.command()
def cancel(
    model: Model,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    as_json: AsJson = False,
) -> None:
    """End the load or reload of a model that is under way."""
    with _client(url, token_file, token_env) as client:
        state = client.finish(model, "cancel")
    _say(state, as_json=as_json, more="" if state.get("thread_ended") else ", its thread goes on")


@app.command()
def watch(
    model: Annotated[str | None, typer.Argument(help="One model alone.")] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    reconnect_timeout: Annotated[
        float,
        typer.Option(help="Seconds that the daemon may stay away; 0 ends with the connection."),
    ] = AWAY,
    as_json: AsJson = False,
) -> None:
    """Print what happens to models, until Ctrl-C, also after the daemon was started anew."""
    with _client(url, token_file, token_env) as client:
        for event in _watch(client, model, reconnect_timeout).events():
            line = json.dumps({"event": event.name, **event.data}) if as_json else describe(event)
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def _watch(client: ManagementClient, model_id: str | None, away: float) -> Watch:
    """Return what yields events; it says on standard error when the daemon is away."""
    try:
        return Watch(client, model_id, away=away, tell=_tell)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--reconnect-timeout") from None


def _tell(line: str) -> None:
    sys.stderr.write(f"splitlearn: {line}\n")
    sys.stderr.flush()


# --- Asking ---------------------------------------------------------------------------------------


@contextmanager
def _client(url: str, token_file: Path | None, token_env: str | None) -> Iterator[ManagementClient]:
    """Yield a client, and turn what can go wrong into a line and an exit code."""
    try:
        # a ConfigError, about the token, is told by the command line itself
        token = read_token(None if token_file is None else str(token_file), token_env)
        yield ManagementClient(_address(url, token))
    except RemoteError as error:
        raise _leave(error, WRONG_USAGE if error.code in _USAGE else FAILED) from error
    except RemoteUnavailable as error:
        raise _leave(error, FAILED) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _address(url: str, token: str | None) -> Address:
    try:
        return Address.parse(url, token)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None


def _leave(error: Exception, code: int) -> typer.Exit:
    sys.stderr.write(f"splitlearn: {error}\n")
    return typer.Exit(code)


def _begin_and_watch(
    client: ManagementClient,
    model_id: str,
    action: str,
    options: dict[str, Any],
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Begin a load or reload, and show how far it is until it has ended.

    The stream is opened first, so that nothing can happen unseen.
    """
    if not wait:
        _say(client.begin(model_id, action, **options)[1], as_json=as_json)
        return
    with client.events(model_id) as events:
        done, state = client.begin(model_id, action, **options)
        if not done:
            _follow(client, model_id, events)
            state = client.model(model_id)
    _say(state, as_json=as_json)


def _follow(client: ManagementClient, model_id: str, events: Iterable[DaemonEvent]) -> None:
    """Show a load's progress until it has ended.

    Raises:
        RemoteError: It failed.
        RemoteUnavailable: The daemon shut down before.
    """
    with tqdm(total=0, unit="B", unit_scale=True, desc=model_id, disable=None) as bar:
        for event in events:
            if event.name == "lost":  # perhaps its end
                event = _as_end(client.model(model_id)) or event  # noqa: PLW2901
            if event.name == "progress":
                _show(bar, event.data)
            elif event.name == "reload_failed" or event.data.get("new") == "failed":
                raise RemoteError(f"model {model_id!r} failed to load: {event.data['reason']}")
            elif event.name == "transition" and event.data["new"] == "ready":
                bar.update((bar.total or 0) - bar.n)
                return
    raise RemoteUnavailable(f"the daemon shut down while it loaded model {model_id!r}")


def _as_end(state: dict[str, Any]) -> DaemonEvent | None:
    """Return the end of a load as an event, if a model's state shows that it has ended."""
    if state["status"] == "loading" or state.get("reloading"):
        return None
    reason = state["reason"] or "it was loaded"
    return DaemonEvent("transition", {"new": state["status"], "reason": reason})


def _show(bar: tqdm[Any], progress: dict[str, Any]) -> None:
    """Let the bar show how far a load is."""
    bar.total = progress["bytes_total"]
    bar.set_postfix_str(progress["phase"].replace("_", " "), refresh=False)
    bar.n = progress["bytes_done"]
    bar.refresh()


# --- Showing --------------------------------------------------------------------------------------


def _say(state: dict[str, Any], *, as_json: bool, more: str = "") -> None:
    """Print a model's state."""
    line = json.dumps(state) if as_json else f"{state['model_id']}: {state['status']}{more}"
    typer.echo(line)


def _row(state: dict[str, Any]) -> tuple[str, ...]:
    """Return a model's line in the table."""
    start, end = state.get("start_layer"), state.get("end_layer")
    held = state.get("reserved_bytes")
    return (
        state["model_id"],
        state["status"],
        state.get("component") or "-",
        "-" if start is None or end is None else layers(start, end),
        state.get("device", "-"),
        state.get("dtype") or "-",
        format_bytes(held) if held else "-",
        _caches(state),
        str(state.get("in_flight", "-")),
        " ".join(state["reason"].split()),
    )


def _caches(state: dict[str, Any]) -> str:
    """Return what the KV caches of a model's sessions have, and of how much where that is fixed."""
    used, budget = state.get("kv_cache_bytes", 0), state.get("kv_cache_budget")
    if budget is None:
        return format_bytes(used) if used else "-"
    return f"{format_bytes(used)} of {format_bytes(budget)}"


def describe(event: DaemonEvent) -> str:
    """Return an event as a line for people."""
    data = event.data
    match event.name:
        case "model":
            return f"{data['model_id']}: {data['status']}"
        case "transition":
            return f"{data['model_id']}: {data['old']} -> {data['new']} ({data['reason']})"
        case "progress":
            return f"{data['model_id']}: {_progress(data)}"
        case "reload_failed":
            return f"{data['model_id']}: stays as it was, a reload failed ({data['reason']})"
        case "lost":
            count = data["count"]
            lost = "events" if count is None else f"{count} events"
            return f"({lost} were lost: this end read too slowly, or was away)"
    return f"{event.name}: {json.dumps(data)}"


def _progress(data: dict[str, Any]) -> str:
    """Return a load's phase, and its bytes where they are known."""
    phase: str = data["phase"].replace("_", " ")
    if not data["bytes_total"]:
        return phase
    return f"{phase}, {format_bytes(data['bytes_done'])} of {format_bytes(data['bytes_total'])}"
