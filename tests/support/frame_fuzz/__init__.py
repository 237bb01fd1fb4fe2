"""Damaged conversations with a daemon: what is sent, and what may come of it."""
