"""Trained classifiers in use: prediction, heat maps, the gallery of a run's images, the demo page."""
