"""Documents: where raw text comes from and how it is read."""
