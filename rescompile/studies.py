"""Training candidates as an Optuna study: every placement once, hopeless ones given up early, results kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rescompile.errors import RescompileError
from rescompile.graph import Graph

if TYPE_CHECKING:
    from rescompile.exploring import Training

_NAME = "placement"
_WARM_UP = 3  # trials that run to their end before any is pruned


def run_study(
    graphs: Mapping[str, Graph], training: Training, progress: Callable[[str], None]
) -> dict[str, tuple[float, int, bool]]:
    """Loss, steps and whether it was pruned, for each placement by its name.

    A placement that the study's storage has a result for is not trained again; several processes may share a study.
    """
    try:
        import optuna
    except ImportError as error:
        raise RescompileError("Training placements needs Optuna: pip install 'rescompile[explore]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = list(graphs)
    sampler = optuna.samplers.GridSampler({_NAME: names}, seed=training.seed)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_WARM_UP, n_warmup_steps=training.steps // 4)
    try:
        study = optuna.create_study(
            study_name=training.study,
            storage=training.storage,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RescompileError(f"The study's storage '{training.storage}' cannot be opened: {reason}.") from error
    other = next((trial for trial in study.trials if trial.params.get(_NAME) not in {None, *names}), None)
    if other is not None:
        raise RescompileError(
            f"The study '{training.study}' already holds another search ('{other.params[_NAME]}'): name another study."
        )

    def objective(trial: Any) -> float:
        from rescompile.fx_training import trainable

        name = trial.suggest_categorical(_NAME, names)
        progress(f"training {name}")

        def report(step: int, loss: float) -> None:
            trial.report(float(loss), step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return float(training.function(trainable(graphs[name]), report, training.steps))

    done = {trial.params.get(_NAME) for trial in study.trials if trial.state.is_finished()}
    if not done.issuperset(names):
        study.optimize(objective)
    return _results(study, training.steps)


def _results(study: Any, steps: int) -> dict[str, tuple[float, int, bool]]:
    results: dict[str, tuple[float, int, bool]] = {}
    for trial in study.trials:
        name = trial.params.get(_NAME)
        if name is None or not trial.state.is_finished() or (trial.value is None and not trial.intermediate_values):
            continue
        pruned = trial.state.name == "PRUNED"
        last = max(trial.intermediate_values, default=steps)
        loss = trial.intermediate_values[last] if pruned else trial.value
        kept = results.get(name)
        if kept is None or (kept[2] and not pruned):
            results[name] = (float(loss), int(last) if pruned else steps, pruned)
    return results
