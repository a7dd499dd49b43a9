"""What happens beside the training loop: dashboards, reports, written predictions."""
