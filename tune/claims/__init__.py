"""Claims of a campaign file, judged against the recorded trials."""
