"""The language model: GPT and nGPT in one class."""
