"""Data checks: duplicates, unreadable images, class imbalance, label issues."""
