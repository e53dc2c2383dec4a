"""The model card: what a model is, how it was trained, on what, what its campaign found, and what the export lacks."""

import json
from collections.abc import Collection, Iterator
from typing import Any

from ngpt.code.version import PROGRAM, commit, own_version
from ngpt.config.base import flatten, printable
from ngpt.data.tokens.hf_tokenizer import TOKENIZER_JSON
from ngpt.data.tokens.tokenizer import MODEL_FILE
from ngpt.export.campaign import CampaignFacts
from ngpt.export.families import REMOTE_CODE, Family
from ngpt.model.gpt import GPT
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.config import TrainConfig

# Settings that a recipe always tells; of the others, those that differ from their defaults.
TOLD = ("steps", "batch_size", "seed", "dtype", "optim.name", "optim.lr", "schedule.name")
# By the file of the tokenizer that the folder has.
USE = {
    TOKENIZER_JSON: """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
ids = tokenizer("The file is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=True)[0]))
```
""",
    MODEL_FILE: """\
```python
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = SentencePieceProcessor(model_file="{name}/tokenizer.model")
ids = torch.tensor([tokenizer.encode("The file is")])
print(tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=True)[0].tolist()))
```

`AutoTokenizer` reads `tokenizer.model`, too, but converts it into a tokenizer of another library, which can encode a
text otherwise: where two ways are almost as probable, and where a text spells a special token.
""",
    "": """\
```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
ids = torch.tensor([[0, 1, 2]])  # ids of tokens, as the model was trained on
print(model.generate(ids, max_new_tokens=20, do_sample=True))
```
""",
}


def model_card(
    name: str,
    model: GPT,
    checkpoint: Checkpoint,
    family: Family,
    *,
    facts: CampaignFacts | None,
    tokenizer: Collection[str],
    missing: str,
    checked: str,
) -> str:
    """Returns the README.md of an exported folder.

    Args:
        name: what the model is called, such as the name of the folder.
        facts: of the campaign; None: it was a single run.
        tokenizer: the names of its files in the folder.
        missing: what the folder lacks, in one line; empty: nothing.
        checked: what the comparison of the logits found, or that there was none.
    """
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- ngpt", "---", ""]
    parts = [
        "\n".join([*head, f"# {_cell(name)}", "", *_what(model, family)]),
        "## Use\n\n" + _use(name, family, tokenizer, missing),
        f"## Training\n\n{_table(_training(model, checkpoint))}",
    ]
    if recipe := list(_recipe(checkpoint)):
        parts.append(f"Settings of the recipe, without those at their defaults:\n\n{_table(recipe)}")
    parts.append(f"## Data\n\n{_table(_data(checkpoint, facts))}")
    if facts is not None:
        parts.append(_campaign(facts))
    parts.append(f"## Limits\n\n{_limits(missing, checked)}")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _what(model: GPT, family: Family) -> Iterator[str]:
    cfg, n_params = model.cfg, sum(parameter.numel() for parameter in model.parameters())
    kind = "A normalized transformer ([nGPT](https://arxiv.org/abs/2410.01131))" if cfg.on_sphere else "A GPT"
    yield (
        f"{kind} with {n_params:,} parameters: {cfg.n_layer} layers of width {cfg.n_embd}, {cfg.n_head} heads, a "
        f"context of {cfg.block_size:,} tokens. It is a base model: it continues text and follows no instructions."
    )
    yield ""
    if family.is_remote_code:
        yield (
            f"transformers has no class for it, so the code of the model is in this folder, in `{REMOTE_CODE}`. It "
            "runs with `trust_remote_code=True` only. Read it first: it is one file and imports torch and transformers."
        )
    else:
        yield f"It is a `{family.model_class}` of transformers and needs no code of this folder."


def _use(name: str, family: Family, tokenizer: Collection[str], missing: str) -> str:
    trust = ", trust_remote_code=True" if family.is_remote_code else ""
    text = next(text for file, text in USE.items() if file in tokenizer or not file)
    text = text.format(name=_cell(name), trust=trust)
    return text if not missing else f"{text}\nThis folder lacks {missing}.\n"


def _training(model: GPT, checkpoint: Checkpoint) -> Iterator[tuple[str, object]]:
    identity, step = checkpoint.identity, checkpoint.step
    if step:
        yield "steps", f"{step:,} of {identity.get('steps', step):,}"
    if step and "batch_size" in identity:
        tokens = step * identity["batch_size"] * model.cfg.block_size
        yield "tokens", f"{tokens:,}"
    if checkpoint.val_loss is not None:
        yield "validation loss", f"{checkpoint.val_loss:.4f} nats per token"
    yield "weights", f"SHA-256 `{checkpoint.weights_sha256}` of the checkpoint"
    number = commit()
    yield "exported by", f"{PROGRAM} {own_version()}" + (f", commit `{number}`" if number else "")


def _recipe(checkpoint: Checkpoint) -> Iterator[tuple[str, object]]:
    defaults = flatten(TrainConfig())
    for name, value in checkpoint.identity.items():
        if not name.startswith("data.") and (name in TOLD or json.dumps(value) != json.dumps(defaults.get(name))):
            yield f"`{name}`", f"`{json.dumps(value)}`"


def _data(checkpoint: Checkpoint, facts: CampaignFacts | None) -> Iterator[tuple[str, object]]:
    settings: dict[str, Any] = checkpoint.data.get("settings") or {}
    yield "corpus", f"`{settings['corpus']}`" if settings.get("corpus") else "not recorded"
    if number := checkpoint.identity.get("data.fingerprint"):
        yield "fingerprint", f"`{number}`"
    tokenizer = checkpoint.data.get("tokenizer") or {}
    spec = tokenizer.get("spec") or checkpoint.identity.get("data.tokenizer")
    if spec:
        digest = f", SHA-256 `{tokenizer['sha256']}`" if tokenizer.get("sha256") else ""
        yield "tokenizer", f"`{spec}`{digest}"
    if facts is not None:
        for label, key in (("training tokens in the corpus", "train_tokens"), ("validation tokens", "val_tokens")):
            if isinstance(count := facts.data.get(key), int):
                yield label, f"{count:,}"
        if digest := facts.data.get("sha256"):
            yield "content", f"SHA-256 `{digest}`"


def _campaign(facts: CampaignFacts) -> str:
    rows = [
        (verdict.phase, verdict.arm, verdict.trials, _effect(verdict.delta), verdict.verdict)
        for verdict in facts.verdicts
    ]
    header = f"| phase | arm | trials | {facts.metric} against the baseline | verdict |\n|---|---|---|---|---|\n"
    table = header + "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)
    changed = " with changes" if facts.is_dirty else ""
    code = f", by commit `{facts.commit}`{changed}" if facts.commit else ""
    device = f" on {_cell(facts.device)}" if facts.device else ""
    return (
        f"## Campaign\n\nThis is a trial of the campaign **{_cell(facts.campaign)}**, trained{device}{code}. What the "
        f"campaign found: {_cell(facts.sentence)}\n\nThe arms that this trial belongs to, each with its effect over "
        f"all its trials and its interval:\n\n{table}"
    )


def _effect(delta: Any) -> str:
    if not delta:
        return ""
    return f"{delta['mean']:+.4f} [{delta['ci_low']:+.4f}, {delta['ci_high']:+.4f}]"


def _limits(missing: str, checked: str) -> str:
    lines = [f"- {checked}"]
    lines += [f"- This folder lacks {missing}."] if missing else []
    lines.append(
        "- A text of more tokens than the context fails or degrades. Trained further, an nGPT needs its matrices to be "
        "projected back to unit vectors after each step, which transformers does not do."
    )
    lines.append("- Nobody has tested what the model says: it repeats what its corpus says, right or wrong.")
    return "\n".join(lines)


def _table(rows: Iterator[tuple[str, object]] | list[tuple[str, object]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)


def _cell(value: object) -> str:
    """Returns a text on one line that ends no cell of a table."""
    return printable(str(value), 2000).replace("|", "\\|")
