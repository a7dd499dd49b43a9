"""Questions about the data and the models that are answered by more than one fit or none."""
