"""Processes that prepare batches ahead and stay between epochs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

TIMEOUT = 300  # s without a batch: an error then, rather than a wait for ever

Request = TypeVar("Request")
Result = TypeVar("Result")


class Workers(Generic[Request, Result]):
    """`count` processes that call `prepare` on requests.

    `prepare` is copied when the first request is made (on Linux, forked), and what it refers to
    stays as it was then. With `pin_memory` the tensors of a result arrive in pinned memory.
    OpenCV goes on without threads of its own, in this process too.

    The processes end with the object. `prepare` must not lead back to it: a cycle is taken apart in
    an order in which torch waits for each process in vain, for five seconds.
    """

    def __init__(
        self, prepare: Callable[[Request], Result], count: int, pin_memory: bool = False
    ) -> None:
        # OpenCV's threads do not survive a fork: a worker would wait for them for ever.
        cv2.setNumThreads(0)
        self._requests = _Requests()
        self._loader: DataLoader[Any] = DataLoader(
            _Calls(prepare),
            batch_size=None,
            sampler=self._requests,
            num_workers=count,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            timeout=TIMEOUT,
            worker_init_fn=_without_threads,
            # Forked workers share the cache; elsewhere each gets a copy.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # not torch's own, which others draw from
            persistent_workers=True,
        )

    def results(self, requests: Iterable[Request]) -> Iterator[Result]:
        """The result of each request, in order, prepared ahead. One such iterator at a time; it may
        be left early. A ValueError or OSError of `prepare` is raised as it is.
        """
        self._requests.current = requests
        for result in self._loader:
            if isinstance(result, Exception):
                raise result
            yield result


class _Requests:
    """What a loader iterates over anew in each epoch."""

    current: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)


class _Calls(TorchDataset[Any]):
    """A function as a data set: what it gives for a request, or what went wrong."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.function(request)
        except (ValueError, OSError) as error:
            return error  # raised here, it would reach the user inside a traceback


def _unchanged(result: Any) -> Any:
    return result


def _without_threads(_: int) -> None:
    """A worker is one thread; one that was not forked would start OpenCV with one a core."""
    cv2.setNumThreads(0)
