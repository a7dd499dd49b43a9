"""The HTTP server of the command ``serve``: limits, uploads, batching, answers, metrics."""
