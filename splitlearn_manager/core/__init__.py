"""Models over time: their states, their entries, their memory, and the manager of it all."""
