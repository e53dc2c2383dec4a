"""What a training step needs before it runs: memory of each GPU, time and traffic, on any number of ranks."""
