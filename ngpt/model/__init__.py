"""The language model: GPT and nGPT in one class."""

from ngpt.model.gpt import GPT, ModelConfig

__all__ = ["GPT", "ModelConfig"]
