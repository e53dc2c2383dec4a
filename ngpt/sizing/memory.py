"""Memory of each rank in a training step, in bytes.

What a step keeps is not counted by a formula. A model of two blocks is traced on tensors without data (torch's
FakeTensorMode), and what autograd saves for the backward pass is added up; all blocks are alike, so this holds for any
depth. Bytes of optimizer state for each entry come from a step of the optimizers on a tiny model. The parts are added
although their peaks do not coincide, so the total is an upper bound.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ngpt.kernels.linear_cross_entropy import BLOCK_BYTES, CHUNK_BYTES
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import KINDS, OptimConfig, build_optimizers, parameters_by_kind
from ngpt.system.device import DTYPES, mixed_precision
from ngpt.training.config import TrainConfig

FLOAT_BYTES = 4  # weights, gradients and moments are float32
TRACED_BLOCKS = 2


@dataclass(frozen=True)
class Shapes:
    """Sizes of the parts of a model: of one block, and of embedding, head and their scales."""

    block: Counter[str]  # numbers of entries by kind, see ngpt/optim/optimizers.py
    rest: Counter[str]
    block_kept: int  # bytes for the backward pass
    rest_kept: int
    block_input: int  # bytes

    def entries(self, n_layer: int) -> Counter[str]:
        """Numbers of entries by kind of a whole model."""
        return Counter({kind: n_layer * self.block[kind] + self.rest[kind] for kind in KINDS})


@dataclass(frozen=True)
class RankMemory:
    """The bytes that a rank needs at most."""

    weights: int
    gradients: int
    moments: int
    activations: int
    loss: int  # logits of a chunk, and the scaled weight of the head
    exchange: int  # weights and gradients that are whole for a time, or rounded copies of gradients
    evaluation: int  # of everything during an evaluation

    @property
    def training(self) -> int:
        """The bytes of everything during a training step."""
        return self.weights + self.gradients + self.moments + self.activations + self.loss + self.exchange

    @property
    def total(self) -> int:
        """The bytes that decide whether it fits."""
        return max(self.training, self.evaluation)


def micro_batch_size(config: TrainConfig, ranks: int) -> int:
    """Sequences that a rank passes at once."""
    most = max(1, config.batch_size // ranks)
    return min(config.micro_batch_size or most, most)


def rank_memory(config: TrainConfig, ranks: int, *, strategy: str, recompute: bool) -> RankMemory:
    """Returns the memory of each rank for a config with a vocabulary.

    Args:
        strategy: how several ranks share the model.
        recompute: whether the backward pass computes each block again (activation checkpointing).
    """
    micro_batch, n_layer = micro_batch_size(config, ranks), config.model.n_layer
    found = shapes_of(config.model, config.dtype, micro_batch)
    entries, per_entry = found.entries(n_layer), moment_bytes(config.optim, config.model.residual)
    whole, moments = FLOAT_BYTES * entries.total(), sum(entries[kind] * per_entry[kind] for kind in KINDS)
    kept = n_layer * found.block_input + found.block_kept if recompute else n_layer * found.block_kept
    activations, loss = kept + found.rest_kept, _loss_buffers(config, micro_batch * config.model.block_size)
    evaluated = loss + found.block_kept  # beside weights and moments
    if ranks == 1 or strategy != "fsdp":
        copies = _rounded_copies(config.distributed.gradient_dtype, entries.total(), ranks) if ranks > 1 else 0
        return RankMemory(whole, whole, moments, activations, loss, copies, whole + moments + evaluated)
    # Gradients of all but the last micro-batch are added up whole, before they are exchanged (`keep_gradients`).
    gradients = whole // ranks if config.batch_size == micro_batch * ranks else whole
    # FSDP2 keeps what is outside the blocks whole from the forward to the backward pass, and gathers the next block
    # while one computes; their gradients are whole until they are exchanged.
    gathered = 2 * FLOAT_BYTES * (found.rest.total() + 2 * found.block.total())
    evaluation = (whole + moments) // ranks + whole + evaluated
    return RankMemory(whole // ranks, gradients, moments // ranks, activations, loss, gathered, evaluation)


def _loss_buffers(config: TrainConfig, tokens: int) -> int:
    """What the loss needs on a GPU beside what it keeps: a chunk of logits, its exponentials, the scaled weight."""
    assert config.model.vocab_size is not None
    width = torch.finfo(DTYPES[config.dtype]).bits // 8
    chunk = min(tokens * config.model.vocab_size * FLOAT_BYTES, CHUNK_BYTES["cuda"])
    scaled_weight = config.model.vocab_size * config.model.n_embd * (FLOAT_BYTES + width)
    return chunk * width // FLOAT_BYTES + min(chunk, BLOCK_BYTES["cuda"]) + scaled_weight


def _rounded_copies(gradient_dtype: str, entries: int, ranks: int) -> int:
    per_entry = {"bfloat16": 2, "float8": FLOAT_BYTES + 1 + ranks}  # what rounding removed, and the gradients of all
    return per_entry.get(gradient_dtype, 0) * entries


def shapes_of(model: ModelConfig, dtype: str, micro_batch: int) -> Shapes:
    """Traces the forward pass of a model with two blocks, on tensors without data; `model.vocab_size` must be set.

    What is kept grows linearly with the micro-batch, so one and two sequences say it for any number.
    """
    cut = model.model_copy(update={"n_layer": TRACED_BLOCKS})
    one, two = _traced(cut, dtype, 1), _traced(cut, dtype, 2)

    def grown(first: int, second: int) -> int:
        return first + (micro_batch - 1) * (second - first)

    return Shapes(
        one.block,
        one.rest,
        block_kept=grown(one.block_kept, two.block_kept),
        rest_kept=grown(one.rest_kept, two.rest_kept),
        block_input=grown(one.block_input, two.block_input),
    )


@lru_cache(maxsize=100)
def _traced(model: ModelConfig, dtype: str, micro_batch: int) -> Shapes:
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = GPT(model)
        marks, block_input = _kept_bytes(traced, dtype, micro_batch)
    kinds = {id(each): kind for kind, members in parameters_by_kind(traced).items() for each in members}
    block, rest = Counter[str](), Counter[str]()
    for parameter in traced.blocks[-1].parameters():
        block[kinds[id(parameter)]] += parameter.numel()
    for parameter in traced.parameters():
        rest[kinds[id(parameter)]] += parameter.numel()
    for kind in block:
        rest[kind] -= TRACED_BLOCKS * block[kind]
    block_kept = marks[TRACED_BLOCKS] - marks[TRACED_BLOCKS - 1]
    return Shapes(block, rest, block_kept, marks[-1] - TRACED_BLOCKS * block_kept, block_input)


def _kept_bytes(model: GPT, dtype: str, micro_batch: int) -> tuple[list[int], int]:
    """Bytes kept for the backward pass: before the first block, after each, and after the loss; of a block's input."""
    owned = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # storages, so that no other tensor gets the same address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    idx = torch.zeros(micro_batch, model.cfg.block_size, dtype=torch.int64)
    with hooks, mixed_precision(torch.device("cpu"), dtype):
        pairs = [(x, total()) for x in model.stream(idx)]
        x = pairs[-1][0]
        loss = model.loss(x if model.final_norm is None else model.final_norm(x), idx)
        marks = [*(kept_until for _, kept_until in pairs), total()]
        del loss  # with it, what was kept
    return marks, x.nbytes


def moment_bytes(optim: OptimConfig, residual: str) -> Mapping[str, int]:
    """Bytes of optimizer state for each entry of a kind of parameters, after a step on a tiny model."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=32, residual=residual))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    kinds = {id(each): kind for kind, members in parameters_by_kind(model).items() for each in members}
    found: dict[str, int] = {kind: 0 for kind in KINDS}
    for optimizer in build_optimizers(model, optim):
        optimizer.step()
        for parameter, state in optimizer.state.items():
            moments = [each for each in state.values() if isinstance(each, Tensor) and each.ndim]
            found[kinds[id(parameter)]] = sum(each.nbytes for each in moments) // parameter.numel()
    return found
