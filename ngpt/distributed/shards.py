"""Folders of safetensors files to which every rank writes its parts of named tensors.

torch.distributed.checkpoint (DCP) writes and reads them. Each file says where its parts belong in the whole tensors, so
any number of ranks, also one, reads them again. Nothing is pickled.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ngpt.distributed.ranks import ProcessRanks


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: ProcessRanks) -> list[Path]:
    """Writes this rank's parts of `tensors` to a file in `folder`; every rank calls it. Returns the files of this rank.

    A tensor that is not a DTensor is written by the first rank. Raises OSError or MemoryError on all ranks if one rank
    fails.
    """
    # Imported here, since it takes half a second.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.tensor import DTensor

    own = {name: value for name, value in tensors.items() if ranks.is_first or isinstance(value, DTensor)}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(own, storage_writer=writer, process_group=ranks.control)
    except CheckpointException as error:  # no Exception, and the same on all ranks
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        raise next((cause for cause in causes if isinstance(cause, Exception)), RuntimeError(str(error))) from None
    return sorted(folder.glob(f"shard-{ranks.index + 1:05d}-*"))


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place, by name: whole ones, or the part that this rank has of a DTensor."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def shard_layout(folder: Path) -> dict[str, Tensor]:
    """Returns whole tensors without content, on the device `meta`, for everything in a folder.

    Raises ValueError if the files do not say where their parts belong.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of a file that somebody else has made
        raise ValueError(f"a shard does not say where its parts belong ({type(error).__name__}: {error})") from None
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder, whole, on the CPU."""
    tensors = {name: torch.empty_like(each, device="cpu") for name, each in shard_layout(folder).items()}
    read_shards(folder, tensors)
    return tensors
