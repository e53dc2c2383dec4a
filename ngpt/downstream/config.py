"""Which downstream tasks to run: the keys of `evaluation:` in a campaign that say what is measured."""

from typing import Annotated, Any

from pydantic import Field, Strict

from ngpt.config.base import Config, runtime_setting
from ngpt.model.config import Count, Width

CORE = "core"  # the metric, and what its tasks' metrics begin with
Names = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Strict(False)]


def is_score(metric: str) -> bool:
    """Whether a metric has the name of a score of downstream tasks: `core`, its standard error, or one with a `/`."""
    return "/" in metric or metric in (CORE, f"{CORE}_stderr")


class DownstreamTasks(Config):
    """Tasks of lm-evaluation-harness by name, and nanochat's CORE."""

    tasks: Names = ()
    """Names of tasks or groups of lm-evaluation-harness."""
    include_path: str | None = runtime_setting(None)
    """Folder with tasks of your own in its YAML format."""
    core: str | None = runtime_setting(None)
    """Nanochat's `eval_bundle`, a folder or a .zip, for the metric `core`; `download`: its own, downloaded once."""
    limit: Count | None = None
    """Examples of each task; null: all."""
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Examples that are shown before each one, of the harness's tasks; null: as the task says."""
    batch_size: Width | None = runtime_setting(None)
    """Sequences at once; null: as many as memory is likely to hold."""

    def asked(self) -> dict[str, Any]:
        """What determines the scores of a model, as a record keeps it."""
        return {
            "tasks": list(self.tasks),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "core": self.core is not None,
        }
