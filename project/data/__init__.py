"""Images and labels: sources, splits, decoding, transforms and the data module. Independent of models."""
