"""The settings that a trial trains with, beyond those that decide its results."""

from ngpt.training.config import TrainConfig
from tune.planning.plan import PlannedPhase, PlannedTrial
from tune.session.executor_info import ExecutorInfo
from tune.spec.schema import Campaign


def as_trained(trial: PlannedTrial, phase: PlannedPhase, campaign: Campaign, executor: ExecutorInfo) -> TrainConfig:
    """Returns the trial's config with its names in tracking tools and their modes, and how its ranks share a model.

    The results do not depend on these.
    """
    labels = {"group": campaign.name, "job_type": trial.phase, "run_name": f"{trial.arm} seed {trial.seed}"}
    resolved = executor.tracker or campaign.base.tracker
    modes = {name: getattr(resolved, name) for name in ("wandb", "mlflow", "trackio")}
    if campaign.base.tracker.shows_parameters:
        labels["varied"] = " ".join(phase.varied)
    tracker, distributed = trial.config.tracker.model_copy(update=labels | modes), trial.config.distributed
    if campaign.resources.ranks_per_trial > 1:
        distributed = distributed.model_copy(update={"strategy": campaign.resources.strategy})
    return trial.config.model_copy(update={"tracker": tracker, "distributed": distributed})
