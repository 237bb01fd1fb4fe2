"""The command line.

Nothing heavy is imported before a command knows that it needs it, so that `--help` and errors in a
configuration come at once.  Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from splitlearn_manager.commands.architectures import list_architectures
from splitlearn_manager.commands.bench import bench
from splitlearn_manager.commands.chat import chat
from splitlearn_manager.commands.generate import generate
from splitlearn_manager.commands.inspect import inspect
from splitlearn_manager.commands.models import app as models_app
from splitlearn_manager.commands.options import SplitPointsCommand
from splitlearn_manager.commands.plan import plan
from splitlearn_manager.commands.serve import serve
from splitlearn_manager.commands.split import split
from splitlearn_manager.commands.verify import verify
from splitlearn_manager.errors import ConfigError

app = typer.Typer(
    name="splitlearn",
    help="Split Hugging Face decoders; serve the middle, keep the ends at home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("serve", cls=SplitPointsCommand)(serve)
app.command("chat", cls=SplitPointsCommand)(chat)
app.command("generate", cls=SplitPointsCommand)(generate)
app.command("plan", cls=SplitPointsCommand)(plan)
app.command("split", cls=SplitPointsCommand)(split)
app.command("verify", cls=SplitPointsCommand)(verify)
app.add_typer(models_app, name="models")
app.command("architectures")(list_architectures)
app.command("bench")(bench)
app.command("inspect")(inspect)

WRONG_USAGE = 2


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
