"""Choosing kernels: each candidate of a step is checked against the step's definition in float32,
the ones that agree are timed on the device, the fastest wins.

A step is measured alone, on random inputs in memory of its own with the strides it will have, its
output poisoned with NaN first. Steps of one shape are measured once. At a batch that was not
measured, the winner of the nearest that was is only checked.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from yolov4_fast.engines.cuda.choices import Choice, Choices, Key
from yolov4_fast.engines.cuda.device import Run
from yolov4_fast.engines.engine import EngineError

logger = logging.getLogger(__name__)

Seconds = Callable[[Run], float]

REASON = 80  # characters of why a kernel cannot be used, in the error that lists all of them


class KernelWarning(UserWarning):
    """A kernel that is not used, because it disagrees with the definition of its step."""


class Trial(ABC):
    """A step set up for measuring: memory with random inputs, and what could run it."""

    names: Sequence[str]  # of the kernels to try

    @abstractmethod
    def make(self, name: str) -> Run:
        """A kernel in this memory, of `names` or as well suited for another batch. It may compile
        for seconds, and raises whatever its library raises where it cannot run here.
        """

    @abstractmethod
    def problem(self, run: Run) -> str | None:
        """Run once on a poisoned output. What is wrong with the result; None where nothing is."""


@dataclass
class Refused:
    """Why kernels that were tried for a step cannot be used. memory: what torch said where it had
    too little for one of them.
    """

    reasons: dict[str, str] = field(default_factory=dict)  # by kernel
    memory: str | None = None

    def error(self, key: Key) -> Exception:
        """What is to be raised where that were all kernels."""
        if self.memory is not None:
            return torch.OutOfMemoryError(self.memory)
        tried = "; ".join(f"{name}: {_short(reason)}" for name, reason in self.reasons.items())
        return EngineError(
            f"no kernel computes {key.shape} at batch {key.batch} rightly on this GPU "
            f"(tried: {tried})"
        )


def tune(
    trials: Mapping[Key, Callable[[], Trial]],
    choices: Choices,
    seconds: Seconds,
    *,
    measure: bool,
    progress: bool = True,
) -> bool:
    """Fill `choices` for the keys of `trials`; returns whether it learnt anything.

    measure: time all candidates, also where those of another batch are known. seconds: times a
    run. Raises EngineError where no candidate of a step is right, and torch.OutOfMemoryError where
    that is because memory did not suffice for one.
    """
    missing = [key for key in trials if not choices.settled(key, measure)]
    told: set[str] = set()
    with tqdm(
        missing,
        desc="choosing kernels",
        unit="step",
        leave=False,
        disable=None if progress else True,  # None: shown only on a terminal
    ) as bar:
        for key in bar:
            choices.table[key] = _choose(key, trials[key](), choices, seconds, measure, told)
    return bool(missing)


def _choose(
    key: Key, trial: Trial, choices: Choices, seconds: Seconds, measure: bool, told: set[str]
) -> Choice:
    refused = Refused()
    known = None if measure else choices.nearest(key)
    if known is not None:
        checked = _tried(key, trial, known.kernel, None, told, refused)
        if checked is not None:
            return checked
    measured = [
        choice
        for name in trial.names
        if (choice := _tried(key, trial, name, seconds, told, refused)) is not None
    ]
    if not measured:
        raise refused.error(key)
    return min(measured, key=lambda choice: choice.seconds or 0.0)


def _tried(
    key: Key,
    trial: Trial,
    name: str,
    seconds: Seconds | None,
    told: set[str],
    refused: Refused,
) -> Choice | None:
    """The kernel, timed if `seconds` is given; None where it cannot be used, which `refused` then
    explains. told: the names of those that were warned of.
    """
    try:
        run = trial.make(name)
        problem = trial.problem(run)
        if problem is None:
            choice = Choice(name, None if seconds is None else seconds(run))
            logger.debug("%s, batch %d: %s", key.shape, key.batch, choice)
            return choice
    except torch.AcceleratorError as error:  # nothing runs in this process from here on
        raise EngineError(
            f"the kernel {name} broke off on {key.shape} at batch {key.batch}: {error}"
        ) from None
    except Exception as error:  # Triton's and cuDNN's have no common ancestor but this one
        reason = refused.reasons[name] = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            refused.memory = reason  # not the error, whose traceback would hold the memory
        logger.info("%s cannot run %s at batch %d: %s", name, key.shape, key.batch, reason)
        return None
    refused.reasons[name] = problem
    if name not in told:
        told.add(name)
        warnings.warn(
            f"the kernel {name} is not used: it disagrees with the definition of {key.shape} at "
            f"batch {key.batch}: {problem}",
            KernelWarning,
            stacklevel=4,
        )
    return None


def _short(reason: str) -> str:
    return reason if len(reason) <= REASON else f"{reason[: REASON - 3].rstrip()}..."
