"""The names of MiniMind's files: `{stage}_{hidden_size}{_moe}{_resume}.pth`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"(?P<stage>[a-z][a-z0-9_]*?)_(?P<hidden>[1-9]\d{0,5})(?P<moe>_moe)?(?P<resume>_resume)?"
    r"\.(?:pth|pt|bin|safetensors)"
)
_LORA = "lora_"


@dataclass(frozen=True)
class MiniMindName:
    """What a file's name says: `{stage}_{hidden_size}{_moe}.pth`, `…_resume.pth` for training.

    Attributes:
        stage: `pretrain`, `full_sft`, `dpo`, …; of an adapter `lora_medical`, …
        hidden_size: Width of the model.
        is_moe: Whether it is a mixture of experts.
        is_resume: Whether training goes on from it.
    """

    stage: str
    hidden_size: int
    is_moe: bool = False
    is_resume: bool = False

    @classmethod
    def parse(cls, name: str) -> MiniMindName | None:
        """Read a file's name; `None` where it does not follow the rule."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(found["stage"], int(found["hidden"]), bool(found["moe"]), bool(found["resume"]))

    @property
    def is_lora(self) -> bool:
        """Whether it is an adapter's."""
        return self.stage.startswith(_LORA)

    @property
    def file_name(self) -> str:
        """The file's name."""
        moe, resume = "_moe" * self.is_moe, "_resume" * self.is_resume
        return f"{self.stage}_{self.hidden_size}{moe}{resume}.pth"
