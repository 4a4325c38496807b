"""Training candidates as an Optuna study: every placement once, hopeless ones given up early, results kept on disk.

Several processes, on several machines, may work on one study. Trials are numbered by the database, and trial n takes a
placement when all the running ones before it have theirs: so no two take the same. A process shows that it lives by a
heartbeat in the database; the placement of one that died is free again once its last beat is `_GRACE` seconds old.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.printing import print_graph

if TYPE_CHECKING:
    from rescompile.exploring import Training

_NAME = "placement"
_SEARCH = "search"
_WARM_UP = 3  # trials that run to their end before any is pruned
_BEAT, _GRACE, _POLL = 5, 30, 0.2  # seconds: between heartbeats, until a silent process counts as dead, between looks
_LOCK = 60  # seconds that SQLite waits for another process to finish writing
_ATTEMPTS = 5  # at opening a database that other processes are creating at the same moment


def run_study(
    graphs: Mapping[str, Graph], training: Training, progress: Callable[[str], None]
) -> dict[str, tuple[float, int, bool]]:
    """Loss, steps and whether it was pruned, for each placement by its name.

    A placement that the study's storage has a result for is not trained again; one that another process trains now is
    waited for. A loss that is not a number counts as infinite.
    """
    names = list(graphs)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _open(training, names)
    _claim_study(study, training, _identity(graphs, training))

    def objective(trial: optuna.Trial) -> float:
        from rescompile.fx_training import train

        name = trial.suggest_categorical(_NAME, names)
        progress(f"training {name} ({len(names) - len(_free(study, names))} of {len(names)})")

        def report(step: int, loss: float) -> None:
            trial.report(float(loss), step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            loss = train(graphs[name], training.function, report, training.steps, training.seed)
        except (optuna.TrialPruned, RescompileError):
            raise
        except Exception as error:
            raise RescompileError(f"Training '{name}' failed: {type(error).__name__}: {error}.") from error
        return math.inf if math.isnan(loss) else loss

    try:
        _run(study, names, objective, progress)
    except optuna.exceptions.OptunaError as error:
        where = _shown(training.storage)
        raise RescompileError(f"The study's storage '{where}' failed: {_first_line(error)}.") from error
    return _results(study, training.steps)


def _run(study: optuna.Study, names: Sequence[str], objective: Callable[[optuna.Trial], float], progress: Any) -> None:
    waiting = False
    while True:
        if _free(study, names):
            study.optimize(objective, n_trials=1, catch=(_NothingLeftError,))
            continue
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not running:
            return
        if not waiting:
            progress(f"waiting for {len(running)} placements that other processes train")
            waiting = True
        time.sleep(_POLL)
        optuna.storages.fail_stale_trials(study)


def _open(training: Training, names: Sequence[str]) -> optuna.Study:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_WARM_UP, n_warmup_steps=training.steps // 4)
    attempts = 0
    while True:
        attempts += 1
        try:
            return optuna.create_study(
                study_name=training.study,
                storage=_storage(training.storage),
                sampler=_Once(names),
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:
            if attempts == _ATTEMPTS or not isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError):
                raise RescompileError(
                    f"The study's storage '{_shown(training.storage)}' cannot be opened: {_reason(error)}."
                ) from error
            time.sleep(_POLL)


def _storage(url: str | None) -> optuna.storages.RDBStorage | None:
    """The database; None keeps results in memory."""
    if url is None:
        return None
    arguments = {"connect_args": {"timeout": _LOCK}} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(url, arguments, heartbeat_interval=_BEAT, grace_period=_GRACE)


class _NothingLeftError(Exception):
    """Another process took the last placement."""


class _Once(optuna.samplers.BaseSampler):
    """Every placement once, in order, whoever asks."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> str:
        """The first placement that no trial has; _NothingLeftError where all are taken."""
        started = time.monotonic()
        while True:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            undecided = [other for other in running if other.number < trial.number and _NAME not in other.params]
            if not undecided:
                break
            if time.monotonic() - started > _GRACE:
                study.tell(undecided[0].number, state=TrialState.FAIL)
            time.sleep(_POLL / 10)
        free = _free(study, self._names)
        if not free:
            raise _NothingLeftError
        return free[0]


def _free(study: optuna.Study, names: Sequence[str]) -> list[str]:
    """The placements that no trial has been finished for and that none is running for."""
    trials = study.get_trials(deepcopy=False)
    taken = {trial.params.get(_NAME) for trial in trials if trial.state != TrialState.FAIL}
    return [name for name in names if name not in taken]


def _identity(graphs: Mapping[str, Graph], training: Training) -> dict[str, Any]:
    """What the results of a study depend on."""
    function = training.function
    content = print_graph(next(iter(graphs.values())))
    return {
        "model": hashlib.sha256(content.encode()).hexdigest()[:16],
        "placements": list(graphs),
        "training function": f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}",
        "steps": training.steps,
        "seed": training.seed,
    }


def _claim_study(study: optuna.Study, training: Training, identity: Mapping[str, Any]) -> None:
    found = study.user_attrs.get(_SEARCH)
    if found is None:
        if study.get_trials(deepcopy=False):
            raise RescompileError(f"The study '{training.study}' holds something else: name another study.")
        study.set_user_attr(_SEARCH, dict(identity))
        return
    other = next((key for key, value in identity.items() if found.get(key) != value), None)
    if other is not None:
        raise RescompileError(
            f"The study '{training.study}' already holds another search, with other {other}: name another study."
        )


def _results(study: optuna.Study, steps: int) -> dict[str, tuple[float, int, bool]]:
    results: dict[str, tuple[float, int, bool]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        name = trial.params[_NAME]
        pruned = trial.state == TrialState.PRUNED
        last = max(trial.intermediate_values, default=steps)
        loss = trial.intermediate_values[last] if pruned else trial.value
        results[name] = (math.inf if loss is None else float(loss), last if pruned else steps, pruned)
    return results


def _shown(url: str | None) -> str:
    """The URL without its password."""
    try:
        return "" if url is None else make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url or ""


def _reason(error: Exception) -> str:
    driver = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    if isinstance(driver, ModuleNotFoundError) and driver.name:
        return f"its driver, the package '{driver.name}', is not installed"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
