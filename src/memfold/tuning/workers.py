"""Workers that take trials from a study until it has enough."""

from contextlib import ExitStack

from memfold.studies.executor import Stopped
from memfold.studies.runner import RunFailed, Runner
from memfold.tuning.configuration import Configuration
from memfold.tuning.study import Study, Trial
from memfold.tuning.trial import Objective, TakenOver

__all__ = ["run_trials"]

_SECONDS_BETWEEN_LOOKS = 0.5


def run_trials(
    study: Study, configuration: Configuration, launcher: Runner, num_trials: int
) -> None:
    """Run trials until the study has enough, or `launcher.stop` is set.

    Enough are `num_trials` that are completed or pruned, or as many that failed.
    """
    while not launcher.stop.event.is_set():
        with ExitStack() as claim:
            claim.enter_context(study.claimed())
            study.recover()
            states = [trial.state for trial in study.trials()]
            num_done = states.count("completed") + states.count("pruned")
            if num_done >= num_trials or states.count("failed") >= num_trials:
                return
            if num_done + states.count("running") < num_trials:
                _run_one(study, configuration, launcher, claim)
                continue
        launcher.stop.event.wait(_SECONDS_BETWEEN_LOOKS)  # a running one may fail


def _run_one(
    study: Study, configuration: Configuration, launcher: Runner, claim: ExitStack
) -> None:
    study.seed_sampler()
    with ExitStack() as hold:
        objective = Objective(study, configuration, launcher, claim, hold)
        try:
            study.optuna.optimize(objective, n_trials=1, catch=(RunFailed, Stopped, TakenOver))
        except ValueError:
            if not objective.is_taken_over:  # Optuna refuses what it is told of such a trial
                raise
    if objective.number is not None and not objective.is_taken_over:
        print(_line(study.trials()[objective.number]), flush=True)


def _line(trial: Trial) -> str:
    setting = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in trial.setting.items()
    )
    outcome = {
        "completed": lambda: f"{trial.value:.4f}",
        "pruned": lambda: f"pruned after epoch {trial.num_epochs}",
        "failed": lambda: f"failed: {trial.reason}",
    }.get(trial.state, lambda: "interrupted, to be tried again")()
    return f"trial {trial.number}: {setting}: {outcome} ({trial.seconds:.0f} s)"
