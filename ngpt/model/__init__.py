"""The language model: GPT and nGPT in one class."""

from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

__all__ = ["GPT", "ModelConfig"]
