"""Feature store: outputs of the frozen prefix, computed once per image and view and stored on disk."""
