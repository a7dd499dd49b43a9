"""Inference with trained classifiers: prediction, heat maps, gallery of a run's images, demo page."""
