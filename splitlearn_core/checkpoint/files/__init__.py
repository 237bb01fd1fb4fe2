"""Folders and files of checkpoints: written so that they survive, and checked as they are read."""
