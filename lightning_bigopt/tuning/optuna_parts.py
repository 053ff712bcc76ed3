"""Samplers and pruners of Optuna by name."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import shown

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["FIRST", "NOT_DRAWN", "REPEATS", "make_pruner", "make_sampler"]

_PACKAGES = {"CmaEsSampler": "cmaes", "GPSampler": "scipy"}
_STATIC = ("QMCSampler", "GridSampler", "BruteForceSampler")
"""Samplers whose next point depends on the storage; another seed would be another sequence."""

FIRST, REPEATS = "first", "repeats"
"""Attributes of a repetition: the numbers of the first trial with its values and of the last."""
NOT_DRAWN = "not_drawn"
"""Attribute of a trial that has ended before it had all its values."""


def make_sampler(
    sampler: Any, *, seed: int, all_trials: Callable[[], list[FrozenTrial]] | None = None
) -> Any:
    """Returns a sampler of Optuna.

    A sampler given by name is seeded for each trial from ``seed`` and the number of the trial,
    without the trials that repeat an earlier one. A study that is started again, and several
    processes with one storage, then do not draw the random numbers of earlier trials again. A study
    of one process that was killed draws the values that it would have drawn, except with Hyperband,
    whose brackets depend on the number of the trial.

    Args:
        sampler: A name such as ``"TPE"`` or ``"TPESampler"``, or a sampler, which is returned.
        seed: Seed of the study.
        all_trials: Returns the trials of the study; None for those that Optuna passes to the
            sampler, which are those of one bracket with Hyperband.

    Raises:
        ValueError: If there is no such sampler.

    Example:
        >>> make_sampler("TPF", seed=0)
        Traceback (most recent call last):
        ValueError: sampler must be a sampler of Optuna or its name, got 'TPF'; did you mean 'TPE'?
    """
    import optuna

    if isinstance(sampler, optuna.samplers.BaseSampler):
        return sampler
    kind = _find_class("sampler", sampler, optuna.samplers, suffix="Sampler")
    package = _PACKAGES.get(kind.__name__)
    if package is not None and find_spec(package) is None:  # it is imported at a later trial
        raise ValueError(
            f"sampler must be one whose packages are installed, got {shown(sampler)}, which needs "
            f"{package}; pip install {package}, or choose 'TPE'"
        )
    made = _made("sampler", sampler, lambda: kind(seed=seed))  # an error is raised before a trial
    if kind.__name__ in _STATIC:
        return made

    def of_trial(number: int) -> Any:
        return _made("sampler", sampler, lambda: kind(seed=_mixed(seed, number)))

    return _sampler_of_trials(of_trial, all_trials)


def make_pruner(pruner: Any) -> Any:
    """Returns a pruner of Optuna.

    Args:
        pruner: A name such as ``"median"``, ``"MedianPruner"`` or ``"Hyperband"``, a pruner, which
            is returned, or None for no pruning.

    Raises:
        ValueError: If there is no such pruner.

    Example:
        >>> type(make_pruner("successive halving")).__name__
        'SuccessiveHalvingPruner'
    """
    import optuna

    if isinstance(pruner, optuna.pruners.BasePruner):
        return pruner
    if pruner is None or (isinstance(pruner, str) and pruner.lower() == "none"):
        return optuna.pruners.NopPruner()
    kind = _find_class("pruner", pruner, optuna.pruners, suffix="Pruner")
    return _made("pruner", pruner, kind)


def _find_class(argument: str, name: Any, module: Any, *, suffix: str) -> Any:
    kinds = {
        _plain(kind): getattr(module, kind)
        for kind in module.__all__
        if kind.endswith(suffix) and not kind.startswith("Base")
    }
    if isinstance(name, str):
        for candidate in (_plain(name), _plain(name + suffix)):
            if candidate in kinds:
                return kinds[candidate]
    short = {_plain(k.__name__): k.__name__.removesuffix(suffix) for k in kinds.values()}
    words = {_plain(word): word for word in short.values()}
    similar = get_close_matches(_plain(name), words, n=1) if isinstance(name, str) else []
    advice = f"did you mean {words[similar[0]]!r}?" if similar else ""
    raise ValueError(
        f"{argument} must be a {argument} of Optuna or its name, got {shown(name)}; "
        f"{advice or 'choose among ' + ', '.join(sorted(short.values()))}"
    )


def _plain(name: str) -> str:
    """Returns a name in lower case, without what separates its words."""
    return name.lower().translate(str.maketrans("", "", " _-"))


def _made(argument: str, name: Any, make: Callable[[], Any]) -> Any:
    from optuna.exceptions import ExperimentalWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the user has chosen it by name
            return make()
    except (TypeError, ImportError) as error:
        kind = f"optuna.{argument}s"
        raise ValueError(
            f"{argument} must be an object for one that needs arguments or packages, got "
            f"{shown(name)}: {str(error).splitlines()[0]}; pass an object of {kind}"
        ) from error


def _sampler_of_trials(
    make: Callable[[int], Any], all_trials: Callable[[], list[FrozenTrial]] | None
) -> Any:
    """Makes a sampler that delegates each trial to one of its own.

    Args:
        make: Returns the sampler of a trial, from the number that it would have in a study without
            repetitions.
        all_trials: As for :func:`make_sampler`.
    """
    from optuna.samplers import BaseSampler

    class SamplerOfTrials(BaseSampler):
        """Delegates to the sampler of each trial."""

        def __init__(self) -> None:
            self._samplers: dict[int, Any] = {}

        def _of(self, study: Any, trial: FrozenTrial) -> Any:
            if trial.number not in self._samplers:
                trials = study.get_trials(deepcopy=False) if all_trials is None else all_trials()
                self._samplers[trial.number] = make(_number_without_repetitions(trials, trial))
            return self._samplers[trial.number]

        def before_trial(self, study: Any, trial: Any) -> None:
            self._of(study, trial).before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            found: dict[str, Any]
            found = self._of(study, trial).infer_relative_search_space(study, trial)
            return found

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            found: dict[str, Any]
            found = self._of(study, trial).sample_relative(study, trial, search_space)
            return found

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self._of(study, trial).sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._of(study, trial).after_trial(study, trial, state, values)
            self._samplers.pop(trial.number, None)

    return SamplerOfTrials()


def _number_without_repetitions(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """Returns the number of a trial, or of the first that it repeats, in an uninterrupted study."""
    number = int(trial.user_attrs.get(FIRST, trial.number))
    before = [other for other in trials if other.number < number]
    return number - sum(other.user_attrs.keys() & {REPEATS, NOT_DRAWN} != set() for other in before)


def _mixed(seed: int, number: int) -> int:
    """Returns a 32-bit seed of a trial; Python mixes the text by a hash."""
    return random.Random(f"{seed}/{number}").getrandbits(32)  # noqa: S311  # no cryptography
