"""MiniMind's files: their names, their tensors, and the Hugging Face architecture that they are.

Nothing here imports torch.
"""

from splitlearn_core.checkpoint.minimind.architecture import describe
from splitlearn_core.checkpoint.minimind.file_name import MiniMindName
from splitlearn_core.checkpoint.minimind.made import Made, MiniMindModel, Shapes
from splitlearn_core.checkpoint.minimind.options import (
    AUTO,
    MINIMIND,
    check_options,
    may_be_minimind,
)
from splitlearn_core.checkpoint.minimind.tensor_names import (
    LORA_FACTOR,
    hugging_face_name,
    is_minimind,
)

__all__ = [
    "AUTO",
    "LORA_FACTOR",
    "MINIMIND",
    "Made",
    "MiniMindModel",
    "MiniMindName",
    "Shapes",
    "check_options",
    "describe",
    "hugging_face_name",
    "is_minimind",
    "may_be_minimind",
]
