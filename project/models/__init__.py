"""Networks in pure torch: backbones, weights, heads. No Lightning, no image files."""
