"""Evaluation: metrics, confusion matrix, calibration, confidence intervals and plots."""
