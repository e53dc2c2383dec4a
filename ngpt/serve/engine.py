"""The model behind the server: it loads a checkpoint, turns texts into tokens, and decodes a batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import ConfigError
from ngpt.generation.batch import BatchDecoder
from ngpt.serve.choice import TokenLogprob
from ngpt.system.device import mixed_precision
from ngpt.training.load_model import load_model

SCORED_POSITIONS = 128  # of a prompt at a time, which bounds the memory of their logits


class Engine:
    """A model with its tokenizer and a decoder. Only one thread may decode."""

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        slots: int,
        dtype: str | None = None,
        best: bool = False,
        tokenizer: str | None = None,
        device: str = "auto",
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads a checkpoint and allocates the cache; arguments as in `load_model`.

        Raises:
            ConfigError: it cannot be loaded, or has no tokenizer.
        """
        loaded = load_model(path, best=best, tokenizer=tokenizer, device=device, **(changes or {}))
        if loaded.tokenizer is None:
            raise ConfigError(f"{loaded.checkpoint.path} has no tokenizer: name it with --tokenizer")
        self.name, self.tokenizer, self.checkpoint = name, loaded.tokenizer, loaded.checkpoint
        self._model = loaded.model
        self.context = self._model.cfg.block_size
        sizes = self.tokenizer.token_bytes()
        self.longest_token = None if sizes is None else int(sizes.max())  # UTF-8 bytes
        self.dtype = dtype or self.checkpoint.identity.get("dtype", "float32")  # as in training
        self.device = next(self._model.parameters()).device
        vocab_size = self.tokenizer.vocab_size
        self.decoder = BatchDecoder(self._model, slots=slots, dtype=self.dtype, vocab_size=vocab_size)
        # The same seed gives the same text while this stays the same.
        self.fingerprint = f"fp_{self.checkpoint.weights_sha256[:10]}_{self.dtype}"

    @torch.no_grad()
    def score(self, tokens: list[int], top: int, text_offsets: list[int]) -> list[TokenLogprob]:
        """Returns the log-probability of each token of a prompt, in nats at temperature 1, and the `top` best ones."""
        device, vocab_size = self.device, self.tokenizer.vocab_size
        found = [TokenLogprob(tokens[0], None, (), text_offsets[0])]
        with mixed_precision(device, self.dtype):
            x = self._model.features(torch.tensor([tokens], device=device))[0]
            for start in range(0, len(tokens) - 1, SCORED_POSITIONS):
                targets = tokens[start + 1 : start + 1 + SCORED_POSITIONS]
                scores = self._model.logits(x[start : start + len(targets)])[:, :vocab_size].log_softmax(-1)
                own = scores.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0].tolist()
                best = scores.topk(min(top, vocab_size))
                for index, token in enumerate(targets):
                    pairs = zip(best.indices[index].tolist(), best.values[index].tolist(), strict=True)
                    offset = text_offsets[start + 1 + index]
                    found.append(TokenLogprob(token, own[index], tuple(pairs), offset))
        return found
