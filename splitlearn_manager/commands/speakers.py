"""Which model `generate` and `chat` speak with: one of a file, or one that is named outright.

Nothing here imports torch, but asking a Trunk, which is done last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn_core.plan import FULL, TRUNK
from splitlearn_manager.commands.errors import told_in_one_line
from splitlearn_manager.commands.options import check_dtype, parse_minimind, parse_points
from splitlearn_manager.commands.reading import check_shapes_of, choose_model, read_daemon_config
from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.config.options import TrunkLink

_LINK = re.compile(r"(?P<id>[^@]+)@(?P<address>.+)")
_MOST_TRUNKS = 1000

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML with the model, instead of MODEL.")
]
ConfiguredModel = Annotated[
    str | None, typer.Option("--model", help="Which model of the file, where it has several.")
]
TrunkAddress = Annotated[
    list[str] | None,
    typer.Option(
        "--trunk", help="Address of the Trunk; repeat for several that serve the same one."
    ),
]
TrunkModelId = Annotated[
    str | None, typer.Option("--trunk-model-id", help="The Trunk's id there; default: trunk.")
]
ChainLink = Annotated[
    list[str] | None,
    typer.Option("--chain", help="ID@ADDRESS of each Trunk in a row, in order; repeat."),
]
TokenEnv = Annotated[
    str | None, typer.Option("--token-env", help="Environment variable with the Trunk's token.")
]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with it, instead.")]
CaFile = Annotated[
    Path | None, typer.Option("--ca-file", help="Certificates that https Trunks must rest on.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; default: 1.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to make.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Choose among so many tokens.")]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Choose among this much probability.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
PromptLookup = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup",
        min=1,
        help="Guess so many tokens from the text so far, and check them in one round trip.",
    ),
]
Assistant = Annotated[
    str | None,
    typer.Option(
        "--assistant", metavar="MODEL", help="A small model at home that guesses tokens instead."
    ),
]


@dataclass(frozen=True)
class Named:
    """A model, as the command line names it.

    Attributes:
        model: Folder, hub name or `builtin:NAME`.
        config: The file that has it instead.
        model_id: Which model of the file.
        split_points: Texts of the cuts.
        trunk: Addresses of the only Trunk.
        trunk_model_id: Its id there.
        chain: `ID@ADDRESS` of each Trunk in a row, instead.
        token_env: Environment variable with the Trunks' token.
        token_file: File with it.
        ca_file: Certificates that they must rest on.
        dtype: What all parts compute in.
        device: Where the parts go that are here.
        quantization: Of these.
        adapter: Added into these.
        minimind: `NAME=VALUE`s that a MiniMind file does not tell.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where files from the hub are kept.
        allow_uncertified: Let in an architecture that was not certified.
        threads: To compute with.
    """

    model: str | None
    config: Path | None
    model_id: str | None = None
    split_points: list[str] | None = None
    trunk: list[str] | None = None
    trunk_model_id: str | None = None
    chain: list[str] | None = None
    token_env: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None
    adapter: str | None = None
    minimind: list[str] | None = None
    revision: str | None = None
    cache_dir: Path | None = None
    allow_uncertified: bool = False
    threads: int | None = None

    def find(self) -> tuple[DaemonConfig, ModelConfig]:
        """Return the limits that hold, and the model's configuration.

        A Trunk that is named by its address alone is asked for its layers and dtype.

        Raises:
            ConfigError: What is named makes no sense, or there is no such model.
            RemoteUnavailable: (a `ConnectionError`) The Trunk can't be reached.
            ValueError: The Trunk is of another model.
        """
        if (self.model is None) == (self.config is None):
            raise ConfigError("give a MODEL, or --config FILE")
        if self.config is not None:
            return self._from_file(self.config)
        if self.model_id is not None:
            raise ConfigError("--model chooses among the models of a --config file")
        return self._from_options(str(self.model))

    def _from_file(self, path: Path) -> tuple[DaemonConfig, ModelConfig]:
        """Return what a file says, with other addresses where they are given."""
        ours = {
            "--split": self.split_points,
            "--trunk-model-id": self.trunk_model_id,
            "--chain": self.chain,
            "--token-env": self.token_env,
            "--token-file": self.token_file,
            "--ca-file": self.ca_file,
            "--dtype": self.dtype,
            "--device": self.device,
            "--quantization": self.quantization,
            "--adapter": self.adapter,
            "--minimind": self.minimind or None,
            "--revision": self.revision,
            "--cache-dir": self.cache_dir,
            "--allow-uncertified": self.allow_uncertified or None,
        }
        if named := [name for name, value in ours.items() if value is not None]:
            raise ConfigError(f"{', '.join(named)}: with --config, the file says that")
        server = {} if self.threads is None else {"server": {"threads": self.threads}}
        settings = read_daemon_config(path, server)
        chosen = choose_model(settings, self.model_id, str(path))
        if self.trunk:
            chosen = _with_trunk(chosen, self.trunk)
        _check_checkpoint(chosen, str(path))
        return settings, chosen

    def _from_options(self, model: str) -> tuple[DaemonConfig, ModelConfig]:
        """Return what the options say."""
        from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415 - slow
        from splitlearn_manager.config.model_config import PIPELINE, ModelConfig  # noqa: PLC0415

        server = {} if self.threads is None else {"server": {"threads": self.threads}}
        settings = DaemonConfig.from_dict(server)
        remote = bool(self.trunk or self.chain)
        if not remote:
            self._refuse_without_trunk()
        shared: dict[str, Any] = {
            "quantization": self.quantization,
            "adapter": self.adapter,
            "revision": self.revision,
            "cache_dir": None if self.cache_dir is None else str(self.cache_dir),
            "allow_uncertified": self.allow_uncertified,
        }
        with told_in_one_line():
            loading = {
                "model_id": "model",
                "model_path": model,
                "device": self.device or "cpu",
                "dtype": check_dtype(self.dtype),
            }
            points = None if self.split_points is None else list(parse_points(self.split_points))
            shared["minimind"] = parse_minimind(self.minimind)
        if not remote:
            whole = {**loading, "config": {"component": FULL, **shared}}
            chosen = ModelConfig.from_dict(whole)
            check_shapes_of([chosen], None)
            _check_checkpoint(chosen, None)
            return settings, chosen
        whole = {"component": FULL, "minimind": shared["minimind"]}
        check_shapes_of([ModelConfig.from_dict({**loading, "config": whole})], None)
        options = {
            **shared,
            "token_env": self.token_env,
            "token_file": None if self.token_file is None else str(self.token_file),
            "ca_file": None if self.ca_file is None else str(self.ca_file),
        }
        links, known = self._ask()
        options["chain"] = [
            {"trunk": list(link.trunk), "trunk_model_id": link.trunk_model_id} for link in links
        ]
        options["split_points"] = points or known["split_points"]
        options["allow_empty"] = True
        loading["dtype"] = loading["dtype"] or known["dtype"]
        chosen = ModelConfig.from_dict({**loading, "model_type": PIPELINE, "config": options})
        check_shapes_of([chosen], None)
        return settings, chosen

    def _refuse_without_trunk(self) -> None:
        """Refuse what is about a Trunk that is elsewhere, where there is none."""
        about = {
            "--split": self.split_points,
            "--trunk-model-id": self.trunk_model_id,
            "--token-env": self.token_env,
            "--token-file": self.token_file,
            "--ca-file": self.ca_file,
        }
        if named := [name for name, value in about.items() if value is not None]:
            raise ConfigError(f"{', '.join(named)}: needs --trunk, the address of the Trunk")

    def _ask(self) -> tuple[tuple[TrunkLink, ...], dict[str, Any]]:
        """Return where the Trunks are, and what they say of cuts and dtype."""
        from splitlearn_manager.client.trunks import (  # noqa: PLC0415
            agreed_dtype,
            check_row,
            reach_all,
        )
        from splitlearn_manager.config.secrets import read_token  # noqa: PLC0415

        token = read_token(
            None if self.token_file is None else str(self.token_file), self.token_env
        )
        ca_file = None if self.ca_file is None else str(self.ca_file)
        links = self._links(token, ca_file)
        trunks = reach_all(links, token, ca_file)
        try:
            check_row(trunks)
            cuts = [trunks[0].start_layer, *(trunk.end_layer for trunk in trunks)]
            dtype = str(agreed_dtype(trunks, None)).removeprefix("torch.")
        finally:
            for trunk in trunks:
                trunk.close()
        return links, {"split_points": cuts, "dtype": dtype}

    def _links(self, token: str | None, ca_file: str | None) -> tuple[TrunkLink, ...]:
        """Return where the Trunks are."""
        from splitlearn_manager.client.connected_model import links_of  # noqa: PLC0415

        if self.trunk and self.chain:
            raise ConfigError("give --trunk or --chain, not both")
        if self.chain:
            return links_of(None, self.trunk_model_id, list(map(_link, self.chain)))
        (link,) = links_of(self.trunk, self.trunk_model_id, None)
        if self.trunk_model_id is not None:
            return (link,)
        return _found_at(link, token, ca_file)


def _found_at(link: TrunkLink, token: str | None, ca_file: str | None) -> tuple[TrunkLink, ...]:
    """Return the Trunks of an address: `trunk`, or else all of `trunk-0`, `trunk-1`, …."""
    from splitlearn_manager.client.remote import RemoteError, RemoteTrunk  # noqa: PLC0415
    from splitlearn_manager.config.options import TrunkLink  # noqa: PLC0415

    def is_there(model_id: str) -> bool:
        with RemoteTrunk(link.trunk, model_id, token=token, ca_file=ca_file) as trunk:
            try:
                return trunk.start_layer >= 0
            except RemoteError as error:
                if error.code != "model_not_found":
                    raise
                return False
            except ConnectionError:
                return True  # whoever connects hears why, and tries the other addresses

    if is_there(TRUNK):
        return (link,)
    found: list[TrunkLink] = []
    while len(found) < _MOST_TRUNKS and is_there(f"{TRUNK}-{len(found)}"):
        found.append(TrunkLink(link.trunk, f"{TRUNK}-{len(found)}"))
    return tuple(found) or (link,)


def _link(text: str) -> dict[str, str]:
    """Return what `trunk-0@http://host:8000` says."""
    match = _LINK.fullmatch(text)
    if match is None:
        raise ConfigError(f"--chain takes ID@ADDRESS, as in trunk-0@http://host:8000; found {text}")
    return {"trunk": match["address"], "trunk_model_id": match["id"]}


def _with_trunk(config: ModelConfig, addresses: list[str]) -> ModelConfig:
    """Return a pipeline's configuration with other addresses for its Trunk."""
    from splitlearn_manager.config.model_config import PIPELINE, ModelConfig  # noqa: PLC0415

    if config.model_type != PIPELINE or "chain" in config.config:
        raise ConfigError(f"--trunk needs a pipeline with one Trunk; {config.model_id} is none")
    return ModelConfig.from_dict(
        config.to_dict() | {"config": {**config.config, "trunk": addresses}}
    )


def _check_checkpoint(config: ModelConfig, source: str | None) -> None:
    """Check what the checkpoint's headers tell."""
    from splitlearn_manager.preflight import check_checkpoints  # noqa: PLC0415 - needs torch

    check_checkpoints([config], source)


def quiet_transformers() -> None:
    """Let transformers say what is wrong, and not how it goes about its work."""
    from transformers.utils import logging  # noqa: PLC0415 - slow

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    """Refuse wishes that sampling alone can meet, where there is none.

    Raises:
        ConfigError: There is none.
    """
    if not temperature and (top_k is not None or top_p is not None):
        raise ConfigError(
            "--top-k and --top-p choose at random, which needs a --temperature above 0"
        )


def check_speculation(prompt_lookup: int | None, assistant: str | None) -> None:
    """Refuse two ways to guess at once.

    Raises:
        ConfigError: Both are wished for.
    """
    if prompt_lookup is not None and assistant is not None:
        raise ConfigError("give --prompt-lookup or --assistant, not both")
