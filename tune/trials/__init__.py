"""One trial or a group of trials, and when a trial is retried."""
