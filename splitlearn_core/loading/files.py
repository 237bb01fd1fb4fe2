"""A checkpoint's files, wherever they lie: a folder, a single weights file, or the hub."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Protocol

from platformdirs import user_cache_path

from splitlearn_core.checkpoint.minimind import MINIMIND, MiniMindName
from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import listed
from splitlearn_core.messages import short
from splitlearn_core.regular_files import refuse_unless_regular
from splitlearn_core.shape import CONFIG_FILE, read_config
from splitlearn_core.user_paths import user_path

BUILTIN_PREFIX = "builtin:"
CACHE_VARIABLE = "SPLITLEARN_CACHE_DIR"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
_MERGE = (
    "merge it into its model first (merge_and_unload of peft, then save_pretrained), and split what"
    " was saved; or name the model's own folder, and this one as its adapter (load_component's"
    " adapter, `config: {adapter: FOLDER}` of a ModelConfig, or load_lora)"
)
_BUILTIN_FOLDER = Path(__file__).resolve().parent.parent / "builtin"


class CheckpointFiles(Protocol):
    """Files by name."""

    @property
    def description(self) -> str:
        """The folder or hub name, for messages."""
        ...

    @property
    def weights_file(self) -> str | None:
        """The one file that holds the weights, where the user named a file."""
        ...

    def find(self, name: str) -> Path | None:
        """Return a file's path here, fetched if need be; `None` where there is no such file."""
        ...

    def fetch(self, name: str) -> Path:
        """Return a file's path here; an error where there is no such file."""
        ...

    def describe(self, name: str) -> str:
        """Name a file in a message."""
        ...


class FolderFiles:
    """The files in a folder.

    Attributes:
        made_config: What stands for `config.json`, where the files are of a kind that has none.

    A link must stay within the folder: what a checkpoint says lies beside it must not come from
    anywhere else.  In the hub client's cache, links lead to the folder `blobs` of the same model.
    A file that the user named may be a link to anywhere.
    """

    made_config: dict[str, Any] | None = None

    def __init__(self, folder: Path, weights_file: str | None = None) -> None:
        self.folder = folder
        self.description = str(folder)
        self.weights_file = weights_file

    def find(self, name: str) -> Path | None:
        """Return the path of a file in the folder.

        Raises:
            CheckpointError: (a `ValueError`) It is no regular file, or a link that leaves the
                folder or leads nowhere.
        """
        path = self.folder / name
        if path.is_symlink() and name != self.weights_file:
            check_link(path)
        refuse_unless_regular(path)
        return path if path.exists() else None

    def fetch(self, name: str) -> Path:
        """Return the path of a file in the folder, which must be there; raises as `find`."""
        path = self.find(name)
        if path is None:
            raise CheckpointError(f"{self.folder / name} is not there")
        return path

    def describe(self, name: str) -> str:
        """Return the file's path."""
        return str(self.folder / name)


def check_link(path: Path) -> None:
    """Refuse a link that leaves its folder, or leads nowhere."""
    target = Path(os.path.realpath(path))
    folder = Path(os.path.realpath(path.parent))
    is_snapshot = folder.parent.name == "snapshots"
    is_blob = is_snapshot and target.parent == folder.parent.parent / "blobs"
    if not (target.is_relative_to(folder) or is_blob):
        raise CheckpointError(
            f"{path} is a link that leaves its folder, to {target}; put a copy in its place"
        )
    if not path.exists():
        raise CheckpointError(f"{path} is a link that leads nowhere")


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return where fetched files are kept: the argument, `$SPLITLEARN_CACHE_DIR`, or the user's."""
    if cache_dir is not None:
        return user_path(cache_dir)
    named = os.environ.get(CACHE_VARIABLE)
    return user_path(named) if named else user_cache_path("splitlearn")


def find_files(
    model_name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress_bar: bool = False,
) -> CheckpointFiles:
    """Return the files of a model.

    Args:
        model_name_or_path: A folder, of a model or of saved parts; a `.pt`, `.pth`, `.bin` or
            `.safetensors` file with `config.json` beside it; `builtin:NAME`; or a name on the hub
            (`owner/model`).
        cache_dir: Where files of the hub are kept, see `cache_folder`.
        revision: Branch, tag or commit on the hub.
        token: For the hub; `None` uses `HF_TOKEN` or the login, `False` none at all.
        progress_bar: Show a bar while something is fetched.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) Nothing is there; says what was looked for.
        ValueError: What is given can be the name of nothing.
    """
    name = os.fspath(model_name_or_path)
    _check_text(name)
    if name.startswith(BUILTIN_PREFIX):
        return FolderFiles(_builtin(name.removeprefix(BUILTIN_PREFIX)))
    path = user_path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _single_file(path)
    if not _may_be_hub_name(name):
        raise ModelSourceError(f"no model at {name}: there is no such folder or file")
    from splitlearn_core.loading.hub import HubFiles  # noqa: PLC0415 - slow, and not always needed

    return HubFiles(name, cache_folder(cache_dir), revision, token=token, progress_bar=progress_bar)


def local_config(files: CheckpointFiles) -> Path:
    """Return the folder on this machine that holds the model's `config.json`.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is none.
        CheckpointError: (a `ValueError`) An adapter lies beside it.
    """
    path = files.find(CONFIG_FILE)
    adapter = None if files.weights_file is not None else files.find(ADAPTER_CONFIG_FILE)
    if adapter is not None:
        raise _is_adapter(files) if path is None else _has_adapter(files)
    if path is None:
        raise _without_config(files)
    return path.parent


def _without_config(files: CheckpointFiles) -> ModelSourceError:
    """Return the error for files that lie beside no `config.json`; says what else they may be."""
    what = f"no model in {files.description}: it has no {CONFIG_FILE}"
    if not isinstance(files, FolderFiles):
        return ModelSourceError(what)
    places = (files.folder, files.folder / "out")
    file = files.weights_file
    near = [file] if file else sorted(p.name for f in places if f.is_dir() for p in f.iterdir())
    names = {name: named for name in near if (named := MiniMindName.parse(name)) is not None}
    models = [name for name, named in names.items() if not named.is_lora]
    if models:
        what += f"; if it is one of MiniMind's ({listed(models, 4)}), say model_type='{MINIMIND}'"
    elif names:
        what += (
            f"; an adapter of MiniMind's ({listed(names, 4)}) is no model: load its model, and then"
            " the adapter (splitlearn_core.checkpoint.load_lora)"
        )
    return ModelSourceError(what)


def stored_config(files: CheckpointFiles) -> tuple[dict[str, Any], str]:
    """Return what a model's `config.json` holds, and what names it in messages.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is none.
        CheckpointError: (a `ValueError`) It is no JSON object, or an adapter lies beside it.
    """
    if isinstance(files, FolderFiles) and files.made_config is not None:
        return copy.deepcopy(files.made_config), files.description
    path = local_config(files) / CONFIG_FILE
    return read_config(path), str(path)


def config_type_of(files: FolderFiles) -> object:
    """Return the `model_type` of the `config.json` in a folder; `None` where there is none."""
    path = files.find(CONFIG_FILE)
    return None if path is None else read_config(path).get("model_type", "")


def _is_adapter(files: CheckpointFiles) -> ModelSourceError:
    """Say that what lies there goes with a model, and is none."""
    return ModelSourceError(
        f"{files.description} holds a PEFT adapter ({ADAPTER_CONFIG_FILE}), no model: {_MERGE}"
    )


def _has_adapter(files: CheckpointFiles) -> CheckpointError:
    """Say that transformers would make another model of what lies there than its weights alone."""
    return CheckpointError(
        f"{files.description} holds a PEFT adapter ({ADAPTER_CONFIG_FILE}) beside its model, with"
        f" which transformers would load it: {_MERGE}.  Where the model is meant without the"
        " adapter, take that file away"
    )


def _builtin(name: str) -> Path:
    """Return the folder of a model that comes with this package."""
    known = sorted(p.name for p in _BUILTIN_FOLDER.iterdir() if (p / CONFIG_FILE).is_file())
    if name not in known:
        raise ModelSourceError(f"no built-in model {name!r}; there is {', '.join(known)}")
    return _BUILTIN_FOLDER / name


def _folder(path: Path) -> FolderFiles:
    """Return the files of a model's folder, or of a folder with saved parts of one."""
    from splitlearn_core.loading.parts_files import parts_files  # noqa: PLC0415 - builds on this

    return parts_files(path) or FolderFiles(path)


def _single_file(path: Path) -> FolderFiles:
    """Return the folder around a weights file that the user named."""
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise ModelSourceError(
            f"{path} is a file; name the model's folder, or a weights file that ends in"
            f" {', '.join(TORCH_SUFFIXES)} or {SAFETENSORS_SUFFIX}"
        )
    return FolderFiles(path.parent, weights_file=path.name)


def _check_text(name: str) -> None:
    """Refuse what no system takes for a path and no hub for a name, and no message could show."""
    if not name or "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(
            f"{short(name)} is no model's name or path: it is empty, or holds a NUL or a lone"
            " surrogate"
        )


def _may_be_hub_name(name: str) -> bool:
    """Whether `name` has the form of a hub name: `model` or `owner/model`, and no path."""
    parts = name.split("/")
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name
    return not is_path and len(parts) <= 2 and all(parts) and not name.endswith(TORCH_SUFFIXES)  # noqa: PLR2004
