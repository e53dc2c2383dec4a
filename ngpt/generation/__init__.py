"""Generation: sampling, the plain loop, and decoding of many requests at once in a cache of slots."""
