"""Studies: many trainings of one task, compared."""
