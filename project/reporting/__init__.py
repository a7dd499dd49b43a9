"""Reports of a run: dashboard, summary and model card."""
