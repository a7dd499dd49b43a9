"""Synthetic predictions whose truth is known."""

import numpy as np


def calibrated(count: int, classes: int = 4, sharpness: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(N, C)``, float32, and labels drawn from exactly these probabilities."""
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((count, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) < generator.random((count, 1))).sum(1).clip(max=classes - 1)
    return probabilities.astype(np.float32), labels


def sharpened(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Overconfident probabilities, which a temperature makes right again."""
    powers = probabilities.astype(np.float64) ** temperature
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)
