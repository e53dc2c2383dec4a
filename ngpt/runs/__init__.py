"""A single run as a command: its folder, how it resumes and stops, and advice on its settings."""
