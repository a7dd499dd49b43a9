"""Classes that are named in a config, a flag or a checkpoint, and what these names may import."""
