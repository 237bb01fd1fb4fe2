"""States that an architecture keeps in its modules, where its cache should have them.

One sequence would go on from another's then.  Here each cache has them, and a forward finds its own
in the modules; one forward at a time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from splitlearn_core.cache import PartCache

if TYPE_CHECKING:
    from torch import nn

KEPT = {"recurrent_gemma": ("recurrent_states", "conv1d_state")}
"""By type: the attributes of modules."""


class ModuleStates:
    """What one part's modules keep.

    Attributes:
        names: Of the modules' attributes.
        whole: Whether the model is: without a part's cache it then does as it always did.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, whole: bool = False) -> None:
        self.names = names
        self.whole = whole
        self._model = model
        self._slots = [(m, n) for m in model.modules() for n in names if n in vars(m)]
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleStates:
        """Return those of the copy of the part."""
        return ModuleStates(copy.deepcopy(self._model, memo), self.names, whole=self.whole)

    @contextmanager
    def of(self, cache: Any) -> Iterator[None]:
        """Let the modules have a cache's states within the block, and the cache what they become.

        Without a part's cache they begin with none, and what they become is given up.
        """
        if not self._slots or (self.whole and not isinstance(cache, PartCache)):
            yield
            return
        kept = cache if isinstance(cache, PartCache) else None
        with self._lock:
            self._put(kept.module_states if kept is not None else ())
            try:
                yield
            finally:
                if kept is not None:
                    kept.module_states = tuple(getattr(m, n) for m, n in self._slots)
                self._put(())

    def _put(self, states: tuple[Any, ...]) -> None:
        """Give every module its state; none where there are none yet."""
        for (module, name), state in zip(
            self._slots, states or (None,) * len(self._slots), strict=True
        ):
            setattr(module, name, state)
