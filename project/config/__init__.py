"""Class specifications in configs, flags and checkpoints, and the import allowlist."""
