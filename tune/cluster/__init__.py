"""What joining a running Ray cluster takes: its address, and this project's code and data on its nodes."""
