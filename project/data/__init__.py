"""Images and labels: where they come from, how they are split, and how they are read. Knows nothing of models."""
