"""Writes token files as other programs do."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LLM_C = {1: (20240520, "<u2"), 7: (20240801, "<u4")}
MEGATRON_CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8, "<u4": 9, "<u8": 10}


def write_llm_c(path: Path, ids: np.ndarray, *, version: int = 1) -> Path:
    """As llm.c's dev/data/data_common.py: 256 words of header, then uint16 or uint32."""
    magic, dtype = LLM_C[version]
    header = struct.pack("<3i", magic, version, len(ids)).ljust(1024, b"\0")
    path.write_bytes(header + np.asarray(ids).astype(dtype).tobytes())
    return path


def write_megatron(path: Path, documents: Sequence[np.ndarray], dtype: str) -> Path:
    """As Megatron-LM's IndexedDatasetBuilder, one sequence a document: PREFIX.bin and PREFIX.idx."""
    arrays = [np.asarray(document).astype(dtype) for document in documents]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], "<i4")
    sizes = lengths.astype("<i8") * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(arrays), len(arrays) + 1)
    positions = (np.cumsum(sizes) - sizes).astype("<i8")
    first_sequences = np.arange(len(arrays) + 1, dtype="<i8")  # of each document
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + positions.tobytes() + first_sequences.tobytes())
    return path
