"""One session of a campaign: which trial runs next and what its result means."""
