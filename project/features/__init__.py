"""What the frozen prefix makes of each image, computed once and kept on disk."""
