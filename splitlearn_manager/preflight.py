"""Look at what a configuration names before anything is started.

First what needs only `config.json`: is there such a model, has it so many layers.  Then what needs
the checkpoint's headers, and so torch: are all tensors there, of the right shape, in whole files.
Models on a hub are left to their load, which may take long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.minimind import may_be_minimind
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.families import family_of
from splitlearn_core.loading.files import FolderFiles, config_type_of, find_files, local_config
from splitlearn_core.plan import SplitPlan
from splitlearn_core.shape import read_shape
from splitlearn_manager.config.model_config import AUTO, HUGGINGFACE, PIPELINE, PYTORCH
from splitlearn_manager.config.options import PartOptions
from splitlearn_manager.errors import ConfigError, Problem
from splitlearn_manager.generation.text import read_template

if TYPE_CHECKING:
    from splitlearn_core.shape import FindFamily
    from splitlearn_manager.config.model_config import ModelConfig

_ANY_ARCHITECTURE = {AUTO, HUGGINGFACE, PYTORCH, PIPELINE}


def check_shapes(models: Iterable[ModelConfig], source: str | None = None) -> None:
    """Check what `config.json` tells; imports no torch.

    Args:
        models: As configured.
        source: Name of the file that configures them, for messages.

    Raises:
        ConfigError: Has a problem for each model that can't be loaded so.
    """
    _check_each(models, _check_shape, source)


def check_checkpoints(models: Iterable[ModelConfig], source: str | None = None) -> None:
    """Check what the checkpoints' headers tell; imports torch.

    Raises:
        ConfigError: Has a problem for each model whose checkpoint is damaged or incomplete.
    """
    from splitlearn_manager.core.model_loader import ModelLoader  # noqa: PLC0415 - needs torch

    def check(config: ModelConfig) -> None:
        if _is_local(config):
            ModelLoader.estimate(config)

    _check_each(models, check, source)


def _check_each(
    models: Iterable[ModelConfig], check: Callable[[ModelConfig], None], source: str | None
) -> None:
    """Run a check on every model, and tell all that is wrong at once."""
    problems = []
    for number, config in enumerate(models):
        try:
            check(config)
        except ConfigError as error:
            problems += [
                Problem(p.message, p.path, source) for p in error.within("models", number).problems
            ]
        except (SplitLearnError, ValueError, KeyError, OSError) as error:
            message = f"{config.model_id}: {error.args[0] if error.args else error}"
            problems.append(Problem(message, ("models", number), source))
    if problems:
        raise ConfigError(*problems)


def _find_family(config: ModelConfig) -> FindFamily:
    """Return what knows the architectures that a configuration lets in."""
    if not config.options.allow_uncertified:
        return family_of
    from splitlearn_core.uncertified import any_family  # noqa: PLC0415 - needs torch

    return any_family


def _is_local(config: ModelConfig) -> bool:
    """Whether the model lies on this machine; an error where it should and does not."""
    return isinstance(find_files(config.model_path), FolderFiles)


def _is_minimind(config: ModelConfig, files: FolderFiles) -> bool:
    """Whether the model is one of MiniMind's, as far as names tell."""
    named = AUTO if config.model_type in _ANY_ARCHITECTURE else config.model_type
    kind = config_type_of(files)
    return may_be_minimind(files.weights_file, kind, named, config.options.minimind)


def _check_shape(config: ModelConfig) -> None:
    """Check that the model is there, of the named type, and has the layers that are asked for."""
    _check_chat_template(config)
    files = find_files(config.model_path)
    if not isinstance(files, FolderFiles) or _is_minimind(config, files):
        return  # what a MiniMind file is, its tensors tell
    folder = local_config(files)
    shape = read_shape(folder, _find_family(config))
    if config.model_type not in {*_ANY_ARCHITECTURE, shape.model_type}:
        raise ConfigError(
            Problem(
                f"{Path(folder)} is a {shape.model_type} model, not {config.model_type}",
                ("model_type",),
            )
        )
    options = config.options
    if options.split_points is None:
        return
    try:
        plan = SplitPlan.from_split_points(
            shape.num_layers, options.split_points, allow_empty=options.allow_empty
        )
    except ValueError as error:
        raise ConfigError(Problem(str(error), ("config", "split_points"))) from None
    if isinstance(options, PartOptions):
        plan.component(options.component)


def _check_chat_template(config: ModelConfig) -> None:
    """Check that a chat template that is named can be read."""
    path = config.options.chat_template
    if path is None:
        return
    try:
        read_template(path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(error), ("config", "chat_template"))) from None
