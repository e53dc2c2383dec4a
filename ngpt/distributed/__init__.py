"""One run on several devices: ranks, what they agree on, and how gradients and weights are shared."""
