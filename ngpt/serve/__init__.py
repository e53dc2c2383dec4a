"""A server of one model that speaks OpenAI's API for completions: the protocol, the scheduler of a batch, HTTP."""
