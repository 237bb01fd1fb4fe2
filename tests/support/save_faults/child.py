"""Save checkpoints in processes that are killed.

Torch is imported once: each line of standard input is a save, in a process that is forked for it:
FOLDER, STEP, and what kills it: the number of a call of the disk, or the seconds that it has.
The answer is a line with how it ended: its exit code, or minus the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from save_faults.disks import DeadlyDisk
from save_faults.states import save


def main() -> None:
    """Do what standard input says."""
    for line in sys.stdin:
        folder, step, call, seconds = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _save(Path(folder), step, call)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _save(folder: Path, step: int, call: int | None) -> None:
    """Save, and end this process without what its parent would do at its end."""
    code = 1
    try:
        if call is None:
            save(folder, step, large=True)
        else:
            save(folder, step, DeadlyDisk(call))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
