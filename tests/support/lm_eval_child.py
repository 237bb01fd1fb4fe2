"""lm-eval on tasks in a folder, for several models in one process: its imports take long.

    lm_eval_child.py FOLDER '[[MODEL, ARGUMENTS], …]'

Writes, for each model, the figures and the answers of each document, as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = ["choices", "writing"]


def main() -> None:
    """Evaluate."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = []
    for model, arguments in json.loads(sys.argv[2]):
        done: Any = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=TASKS,
            batch_size=4,
            device="cpu",
            task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False),
        )
        samples = {task: [one["filtered_resps"] for one in done["samples"][task]] for task in TASKS}
        found.append({"results": done["results"], "samples": samples})
    os.write(answers, json.dumps(found, default=str).encode() + b"\n")


if __name__ == "__main__":
    main()
