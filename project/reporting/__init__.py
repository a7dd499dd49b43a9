"""What a run leaves for people: the dashboard, the summary, the model card."""
