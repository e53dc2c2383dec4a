"""A user's script, for the type checker: it uses everything that the packages export."""

import threading
from pathlib import Path

import ngpt
import tune
from ngpt import GPT, LoadedModel, ModelConfig, TrainConfig, generate, load_model, train
from ngpt.model import GPT as SAME_GPT
from ngpt.train import TrainConfig as SameConfig
from ngpt.train import train as same_train
from tune import (
    Campaign,
    CampaignInterrupted,
    CampaignResults,
    CampaignRun,
    ComparedResults,
    ConfigError,
    Judged,
    Plan,
    ResultsLocked,
    compare,
    judge,
    load_campaign,
    load_results,
    plan,
    run,
)


def campaigns(folder: Path) -> float:
    campaign: Campaign = load_campaign("question.yaml", {"optim.lr": 1e-3, "model": {"n_embd": 32}})
    planned: Plan = plan(campaign, out=folder)
    seconds: float = planned.seconds + sum(phase.seconds for phase in planned.phases)
    source: str = planned.seconds_source
    stop = threading.Event()
    try:
        ended: CampaignRun = run(
            Path("question.yaml"), ["steps=3"], out="results", inline=True, retrain=True, stop=stop
        )
    except (ConfigError, ResultsLocked) as error:
        raise SystemExit(str(error)) from None
    except CampaignInterrupted as error:
        ended = error.run
    code: int = ended.exit_code
    results: CampaignResults = load_results(ended)
    for trial in results.trials:
        seconds += trial.seconds + len(trial.arm)
    for arm in results.arms:
        if arm.delta is not None:
            seconds += arm.delta.mean * arm.n
    losses = [point.val_loss for point in results.curves if point.val_loss is not None]
    verdicts: list[str] = [claim.verdict for claim in results.claims]
    rows: int = results.trials.to_pandas().shape[0] + results.curves.to_polars().height
    compared: ComparedResults = compare(ended, "results/other", metric="val_bpb")
    names: list[str] = [name for each in compared.arms for name in each.a]
    judged: Judged = judge({"base": {1: 5.0, 2: None}, "wide": {1: 4.9}}, baseline="base", goal="minimize")
    best = judged.arms[0]
    print(source, code, verdicts, rows, names, best.mean, results.answer.sentence, results.summary.phases[0].winner)
    return seconds + sum(losses) + (best.ci_low or 0.0)


def models() -> str:
    config: SameConfig = TrainConfig(model=ModelConfig(n_embd=32, n_layer=2), steps=3)
    for metrics in train(config, "runs/first"):
        loss: float | None = metrics["val_loss"]
        print(loss)
    loaded: LoadedModel = load_model("runs/first", best=True)
    model: GPT = loaded.model
    other: SAME_GPT = GPT(ModelConfig(vocab_size=64))
    texts: list[str] = generate(loaded, ["a", "b"], max_tokens=3, seed=1)
    text: str = generate(model, "a", tokenizer=loaded.tokenizer, temperature=0.5, top_k=4, top_p=0.9)
    print(texts, other, same_train, ngpt.train, tune.run)
    return text


if __name__ == "__main__":
    print(campaigns(Path("results")), models())
