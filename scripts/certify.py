"""Certify architectures, and write `splitlearn_core/families/certified.json`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from certifier import DTYPES, DifferenceError, certify  # noqa: E402 - from the folder above
from tiny_models import causal_types  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: E402

from splitlearn_core.dtypes import dtype_name  # noqa: E402
from splitlearn_core.families import CERTIFIED  # noqa: E402
from splitlearn_core.tracing import NotAChainError  # noqa: E402

OUT = ROOT / "splitlearn_core" / "families" / "certified.json"
SECONDS = 180
OWN_CACHE = "it keeps a cache of its own kind, which can't be split over parts"


def main() -> None:
    """Certify the types that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="all of them when left out")
    parser.add_argument("--update", action="store_true", help="write down the named types, too")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for model_type in arguments.types or causal_types():
        found[model_type] = examine(model_type)
        print(
            model_type, found[model_type]["status"], found[model_type].get("reason", ""), flush=True
        )
    print(
        sum(entry["status"] == CERTIFIED for entry in found.values()), "of", len(found), CERTIFIED
    )
    if arguments.update or not arguments.types:
        before = json.loads(OUT.read_text("utf-8"))["architectures"] if arguments.types else {}
        merged = dict(sorted({**before, **found}.items()))
        result = {
            "transformers": transformers.__version__,
            "dtypes": [dtype_name(dtype) for dtype in DTYPES],
            "architectures": merged,
        }
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def examine(model_type: str) -> dict[str, Any]:
    """Return an architecture's entry."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        return {"status": CERTIFIED, "family": certify(model_type).to_dict()}
    except NotAChainError as error:
        reason = str(error)
    except DifferenceError as error:
        reason = f"its parts differ from the unsplit model ({error})"
    except Exception as error:  # noqa: BLE001 - whatever it was, it is why it is not certified
        first_line = next(iter(str(error).splitlines()), "")
        reason = (
            OWN_CACHE
            if keeps_own_cache(model_type)
            else f"it could not be tried: {type(error).__name__}: {first_line[:150]}"
        )
    finally:
        signal.alarm(0)
    return {"status": "refused", "reason": reason}


def keeps_own_cache(model_type: str) -> bool:
    """Whether transformers itself can't give a type the cache that parts have."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return not found._supports_default_dynamic_cache()  # noqa: SLF001 - asked nowhere else


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


if __name__ == "__main__":
    main()
