"""A single run as a command: its folder, how it resumes and stops, advice on its settings, and what evaluates it."""
