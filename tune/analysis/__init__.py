"""Statistics: verdicts, importance of settings, early stopping."""
