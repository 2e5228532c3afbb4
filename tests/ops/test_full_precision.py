"""One switch of the process for all threads that ask for full float32."""

import threading

import torch

from yolov4_fast.ops.full_precision import full_precision


def precision() -> str:
    return torch.backends.cudnn.conv.fp32_precision


def test_it_is_turned_back_by_the_last_that_leaves() -> None:
    before = precision()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert entered.wait(10)
        assert precision() == "ieee"
    assert precision() == "ieee"  # the other is still within
    leave.set()
    thread.join()
    assert precision() == before


def test_it_nests_and_is_turned_back_by_an_error() -> None:
    before = precision()
    try:
        with full_precision(), full_precision():
            assert precision() == "ieee"
            raise KeyError
    except KeyError:
        pass
    assert precision() == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # torch reads it again
