"""The process that tries cases: names come in on standard input, verdicts go out, line by line.

It is under limits, and watched by `campaign.py`: a case may end it, hang, or ask for all memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from checkpoint_fuzz.cases import Case
from checkpoint_fuzz.judge import Sound, Verdict, examine, sound_parts
from checkpoint_fuzz.leftovers import Guard, status
from checkpoint_fuzz.sound import LAYOUTS, checkpoint_folder

READY = "ready"
ADDRESS_SPACE_GROWTH = 2 * 2**30


def main() -> None:
    """Read names of cases from standard input, and write a verdict for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sound", type=Path)
    parser.add_argument("scratch", type=Path)
    arguments = parser.parse_args()
    _be_quiet()
    references = {
        layout: sound_parts(layout, checkpoint_folder(layout, arguments.sound / layout))
        for layout in LAYOUTS
    }
    _limit_memory()
    gc.collect()
    gc.freeze()  # what is here stays: looking through it after each case takes as long as the case
    _say(READY)
    for line in sys.stdin:
        case = Case.parse(line.strip())
        verdict = _try(case, arguments.sound, arguments.scratch, references[case.layout])
        _say(asdict(verdict))


def _try(case: Case, sound: Path, scratch: Path, reference: Mapping[str, Sound]) -> Verdict:
    room = scratch / "case"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    shutil.copytree(sound / case.layout, room / "model", symlinks=True)
    done = case.damage(room / "model")
    guard = Guard(scratch)
    verdict = examine(case, checkpoint_folder(case.layout, room / "model"), done, reference)
    verdict.violations += guard.complaints()
    return verdict


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _be_quiet() -> None:
    transformers.logging.set_verbosity(100)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def _limit_memory() -> None:
    """Let no case take all there is: what asks for too much gets a `MemoryError`."""
    limit = status("VmSize") + ADDRESS_SPACE_GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
