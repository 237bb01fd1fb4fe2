"""What a model's makers say about generating: where it ends, what pads it, how to sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from splitlearn_core.errors import CheckpointError
from splitlearn_core.loading.files import stored_config
from splitlearn_core.messages import in_one_line
from splitlearn_core.shape import read_config

if TYPE_CHECKING:
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.plan import ComponentSpec

GENERATION_CONFIG_FILE = "generation_config.json"


def generation_config_for(spec: ComponentSpec, files: CheckpointFiles) -> GenerationConfig | None:
    """Return the generation settings for a part that has the head; for another, `None`.

    Raises:
        CheckpointError: (a `ValueError`) They are damaged.
    """
    return read_generation_config(files) if spec.is_last else None


def read_generation_config(files: CheckpointFiles) -> GenerationConfig:
    """Return what transformers' `from_pretrained` would find.

    That is `generation_config.json`; where there is none, what `config.json` has of it, as older
    models do.

    Raises:
        CheckpointError: (a `ValueError`) The file is damaged.
    """
    path = files.find(GENERATION_CONFIG_FILE)
    if path is not None:
        return _made(str(path), read_config(path))
    fields, where = stored_config(files)
    return _made(where, fields, of_model=True)


def _made(where: str, fields: dict[str, Any], *, of_model: bool = False) -> GenerationConfig:
    make: Any = GenerationConfig.from_model_config if of_model else GenerationConfig.from_dict
    try:
        config: GenerationConfig = make(fields)
    except Exception as error:
        # it checks its fields, and raises what it likes
        raise CheckpointError(f"{where} makes no sense: {in_one_line(error)}") from error
    return config
