"""Every certified architecture: more cuts than the tests try, and forwards that sequences share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import transformers
from certifier import certify
from joining import TOLERANCE, largest_difference, packed_difference
from tiny_models import LAYERS

from splitlearn_core.families import KNOWN_TYPES, family_of

# A Bottom, a Trunk and a Top have two cuts between them.
_LEAST_CUTS = 2


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Certify `count` types, each with one random cut for every number of parts.

    Where sequences of different lengths can share a forward, each must get what it gets alone.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng = random.Random(seed)  # noqa: S311 - no secret
    types = rng.sample(KNOWN_TYPES, min(count, len(KNOWN_TYPES)))
    for model_type in types:
        cuts = [_cut(rng, points) for points in range(_LEAST_CUTS, LAYERS)]
        what = f"{model_type} at {', '.join(str(list(cut)) for cut in cuts)}"
        yield what, _wrong_with(model_type, cuts)


def _cut(rng: random.Random, points: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(1, LAYERS), points)))


def _wrong_with(model_type: str, cuts: list[tuple[int, ...]]) -> str:
    try:
        certify(model_type, family_of(model_type), cuts=cuts)
        differences = {
            "share forwards": largest_difference(model_type),
            "are packed": packed_difference(model_type),
        }
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is wrong
        return f"{type(error).__name__}: {error}"
    for way, difference in differences.items():
        if difference is not None and not difference <= TOLERANCE:  # not a number is wrong, too
            return f"sequences that {way} differ by {difference:.1e}"
    return ""
