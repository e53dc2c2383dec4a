"""Writes a model as a folder of Hugging Face's transformers: whole or not at all, and checked before it appears."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tokenizer import read_model
from ngpt.export import modeling_ngpt
from ngpt.export.campaign import campaign_facts
from ngpt.export.card import model_card
from ngpt.export.families import REMOTE_CODE, Family, family_of, import_transformers, to_transformers
from ngpt.export.tokenizer_files import TokenizerFiles, tokenizer_files
from ngpt.model.gpt import GPT
from ngpt.system.atomic_files import commit_folder, make_folder, naming
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.load_model import LoadedModel, saved_tokenizer, tokenizer_origin

CARD = "README.md"
TOLERANCE = 1e-5  # of logits, or of the largest one if that is above 1
CHECKED_TOKENS, CHECKED_ROWS = 256, 2


class Exported(NamedTuple):
    """What an export wrote: its family, what it lacks (empty: nothing), and what the comparison found."""

    family: Family
    missing: str
    checked: str


def export_model(loaded: LoadedModel, folder: Path, *, tokenizer: str | None = None, verify: bool = True) -> Exported:
    """Writes `folder`, which must not exist or be empty, with weights, settings, tokenizer and card.

    Raises ConfigError if the folder has files, transformers is missing, the model cannot be expressed exactly, or the
    written model computes other logits. The folder then does not exist. Raises OSError if it cannot be written.

    Args:
        tokenizer: the spec that the tokenizer of `loaded` was loaded from, if it is not the checkpoint's own.
        verify: whether to load the folder again and compare its logits.
    """
    check_free(folder)
    import_transformers()
    family_of(loaded.model.cfg)  # what cannot be exported is refused before anything is written
    content = _tokenizer_content(loaded.checkpoint, tokenizer)
    files = tokenizer_files(loaded.tokenizer, content, context=loaded.model.cfg.block_size)
    make_folder(folder.absolute().parent)
    temp = folder.absolute().with_name(f".tmp-{folder.name}-{uuid.uuid4().hex}")
    temp.mkdir()
    try:
        with naming(folder), without_progress_bars():
            family = _write(loaded, files, temp)
            checked = verify_folder(loaded.model, temp, family) if verify else "The logits were not compared."
            facts = campaign_facts(loaded.checkpoint)
            about: dict[str, Any] = {
                "facts": facts,
                "tokenizer": files.files,
                "missing": files.missing,
                "checked": checked,
            }
            card = model_card(folder.name, loaded.model, loaded.checkpoint, family, **about)
            (temp / CARD).write_text(card, encoding="utf-8")
            if folder.is_dir():
                folder.rmdir()
            commit_folder(temp, folder.absolute())
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Exported(family, files.missing, checked)


def check_free(folder: Path) -> None:
    """Raises ConfigError if there is something at `folder` that an export would overwrite."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already: remove it, or choose another folder")


@torch.no_grad()
def verify_folder(model: GPT, folder: Path, family: Family) -> str:
    """Loads an exported folder and returns a sentence about its logits; ConfigError if they are not the model's."""
    cfg, transformers = model.cfg, import_transformers()
    kind: Any = modeling_ngpt if family.is_remote_code else transformers
    exported = getattr(kind, family.model_class).from_pretrained(str(folder)).eval()
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(
        int(cfg.vocab_size or 0), (CHECKED_ROWS, min(cfg.block_size, CHECKED_TOKENS)), generator=generator
    )
    right = model(idx.to(model.wte.weight.device)).cpu()
    difference = float((exported(idx).logits - right).abs().max())
    allowed = TOLERANCE * max(1.0, float(right.abs().max()))
    if not difference <= allowed:
        raise ConfigError(
            f"the exported model computes other logits: they differ by {difference:.1e}, more than {allowed:.1e}; "
            "this is a bug, please report it (--no-verify writes the folder nevertheless)"
        )
    size = f"{CHECKED_ROWS} x {idx.shape[1]} tokens"
    return f"The logits were compared with the original's over {size}: they differ by at most {difference:.1e}."


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Turns the progress bars of transformers off, which would disturb the output of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write(loaded: LoadedModel, files: TokenizerFiles, folder: Path) -> Family:
    """Writes all files but the card."""
    checkpoint, model = loaded.checkpoint, loaded.model
    steps = {"step": checkpoint.step, "steps": checkpoint.identity.get("steps", 1)}
    family, exported = to_transformers(model, **steps, tokens=files.ids)
    if loaded.tokenizer is not None and (unused := range(loaded.tokenizer.vocab_size, int(model.cfg.vocab_size or 0))):
        exported.generation_config.suppress_tokens = [*unused]  # `ngpt.generate` never samples them either
    exported.save_pretrained(str(folder))
    if family.is_remote_code:
        shutil.copyfile(modeling_ngpt.__file__, folder / REMOTE_CODE)
    for name, content in files.files.items():
        (folder / name).write_bytes(content)
    for path in folder.glob("*.safetensors"):  # which safetensors lets only its owner read
        path.chmod((folder / "config.json").stat().st_mode)
    return family


def _tokenizer_content(checkpoint: Checkpoint, spec: str | None) -> bytes | None:
    """Returns the bytes of the file that the tokenizer was loaded from; None if it has no file."""
    spec = spec or saved_tokenizer(checkpoint) or tokenizer_origin(checkpoint).spec
    return None if spec is None else read_model(spec)
