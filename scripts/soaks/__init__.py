"""The long campaigns, one a module; `scripts/soak.py` has the table."""
