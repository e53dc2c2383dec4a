"""Models of other programs: their files, how they are recognised, and what makes ours compute the same."""
