import math
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from eosin.data_curation.isolation import Lost, run_isolated
from eosin.data_curation.manifest import Status


def test_every_job_comes_back_with_its_result() -> None:
    results = dict(run_isolated(math.sqrt, [1.0, 4.0, 9.0], workers=2, timeout_s=60))
    assert results == {1.0: 1.0, 4.0: 2.0, 9.0: 3.0}


def test_a_process_that_dies_costs_its_job_alone() -> None:
    jobs = [0, int(signal.SIGKILL), 0, int(signal.SIGSEGV), 0]
    results = list(run_isolated(signal.raise_signal, jobs, workers=1, timeout_s=60))
    lost = {job: result for job, result in results if job}
    assert [result for job, result in results if not job] == [None] * 3
    assert all(isinstance(r, Lost) and r.status == Status.CRASHED for r in lost.values())
    assert "SIGKILL" in str(lost[signal.SIGKILL])
    assert "SIGSEGV" in str(lost[signal.SIGSEGV])


def test_a_process_that_dies_while_idle_is_replaced() -> None:
    results = run_isolated(math.sqrt, [1.0, 4.0], workers=1, timeout_s=60)
    assert next(results) == (1.0, 1.0)
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    assert list(results) == [(4.0, 2.0)]


class _Deadly:
    """A job that ends the process that unpacks it, before its function is called."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return signal.raise_signal, (int(signal.SIGKILL),)


def test_a_process_that_dies_before_it_has_its_job_costs_that_job() -> None:
    jobs: list[Any] = [_Deadly(), 4.0]
    first, second = run_isolated(math.sqrt, jobs, workers=1, timeout_s=60)
    assert isinstance(first[1], Lost) and first[1].status == Status.CRASHED
    assert second == (4.0, 2.0)


def test_a_pipe_that_breaks_in_every_way_is_a_lost_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(_: Connection) -> None:
        raise ConnectionResetError

    results = run_isolated(math.sqrt, [1.0], workers=1, timeout_s=60)
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "recv", reset)
        ((_, result),) = results
    assert isinstance(result, Lost) and result.status == Status.CRASHED


def test_a_process_that_hangs_is_ended_and_the_rest_goes_on() -> None:
    started = time.monotonic()
    results = dict(run_isolated(time.sleep, [600.0, 0.0], workers=1, timeout_s=5))
    assert time.monotonic() - started < 60
    assert results[0.0] is None
    assert isinstance(results[600.0], Lost)
    assert results[600.0].status == Status.TIMEOUT


def test_an_exception_is_raised_where_the_results_are_read() -> None:
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        list(run_isolated(math.sqrt, [-1.0], workers=1, timeout_s=60))
