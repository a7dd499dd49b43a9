"""Checkpoints: atomic writes, safe reads, and checks before a fit is resumed."""
