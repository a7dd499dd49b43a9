"""How good a classifier is: metrics, confusion, calibration, intervals, and figures of them."""
