"""The state of a training run: what it is, and how it is taken and given."""
