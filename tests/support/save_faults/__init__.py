"""Saves of training checkpoints that are killed, run into a full disk, or are damaged then."""
