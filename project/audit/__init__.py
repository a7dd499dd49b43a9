"""Checks of the data: what would spoil a result, and labels that look wrong."""
