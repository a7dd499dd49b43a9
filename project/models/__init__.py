"""Networks in pure torch: backbones, their weights, and heads. Knows nothing of Lightning or of images on disk."""
