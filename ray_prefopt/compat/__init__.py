"""TRL's names: its configs as they are written in scripts, and what becomes of them here."""
