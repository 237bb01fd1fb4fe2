"""What adapters go into, and how they lie on disk."""
