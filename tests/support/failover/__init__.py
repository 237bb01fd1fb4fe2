"""Generations whose server is taken away in their middle."""
