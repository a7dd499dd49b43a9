"""Checkpoints: written whole or not at all, read safely, checked before a fit is resumed from them."""
