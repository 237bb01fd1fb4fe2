"""Models, their weights and their names, as checkpoints see them."""
