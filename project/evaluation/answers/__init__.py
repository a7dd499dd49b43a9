"""When to rely on an answer: calibrated probabilities, prediction sets, abstention and unknown images."""
