"""`python -m splitlearn_manager` is the command line."""

from __future__ import annotations

from splitlearn_manager.cli import main

if __name__ == "__main__":
    main()
