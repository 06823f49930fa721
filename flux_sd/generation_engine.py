"""A queue and one worker thread over any LoadedModel: jobs in order, events out, cancel at any time. Floor 9.

Plays the part of the Rust worker's `generation_engine.rs` and `request_queue.rs`. Nothing here polls: the
worker and every listener sleep on a condition until something happens.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, cast

from .errors import Cancelled, FluxSdError
from .request import CancelToken, Complete, Error, Event, GenerationRequest, Result

if TYPE_CHECKING:
    from .model_loader import LoadedModel

OnEvent = Callable[[Event], None]
Loader = Callable[[CancelToken, OnEvent], "LoadedModel"]

_log = logging.getLogger(__name__)


class EngineClosedError(FluxSdError):
    """A job was handed to an engine that was shut down."""


class QueueFullError(FluxSdError):
    """The bounded queue has no room: try again when a job has ended."""


class JobState(Enum):
    """QUEUED -> RUNNING -> one of the other three; a queued job can also be CANCELLED at once."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One request on its way, made by `GenerationEngine.submit`; safe to use from any thread."""

    def __init__(
        self, engine: GenerationEngine, number: int, request: GenerationRequest, on_event: OnEvent | None
    ) -> None:
        self.id = number
        self.request = request
        self.token = CancelToken()
        self._engine = engine
        self._on_event = on_event
        self._events: list[Event] = []
        self._state = JobState.QUEUED
        self._changed = threading.Condition()
        self._announcer: int | None = None  # the thread that tells the listener of the end

    @property
    def state(self) -> JobState:
        with self._changed:
            return self._state

    def events(self) -> Iterator[Event]:
        """All events from the first on, waiting for those to come; ends after the one Complete or Error.

        Raises RuntimeError where the wait would never end: see `result`."""
        i = 0
        while True:
            with self._changed:
                if len(self._events) <= i:
                    self._refuse_to_wait_for_itself()
                self._changed.wait_for(lambda seen=i: len(self._events) > seen)  # type: ignore[misc]
                event = self._events[i]
            yield event
            if isinstance(event, Complete | Error):
                return
            i += 1

    def result(self, timeout: float | None = None) -> list[Result]:
        """Waits for the end and returns the pictures, or raises what the run raised (Cancelled if it was
        cancelled). Raises TimeoutError after `timeout` seconds; the job goes on. Raises RuntimeError where it
        is called by a listener, on the thread that the job's end waits for."""
        with self._changed:
            if not self._ended():
                self._refuse_to_wait_for_itself()
            if not self._changed.wait_for(self._ended, timeout):
                raise TimeoutError(f"job {self.id} is still {self._state.value} after {timeout} s")
            last = self._events[-1]
        if isinstance(last, Complete):
            return last.results
        assert isinstance(last, Error)
        raise last.error

    def cancel(self) -> None:
        """Ends a queued job now and a running one at its next block; does nothing to one that has ended."""
        self.token.cancel()
        if self._engine._withdraw(self):
            self._finish(Error(Cancelled()))

    def _refuse_to_wait_for_itself(self) -> None:
        if threading.get_ident() in (self._engine._worker.ident, self._announcer):
            raise RuntimeError(
                f"job {self.id} was waited for by a listener, on the thread that runs it: take the pictures "
                "from the Complete event's results, or wait in another thread"
            )

    def _ended(self) -> bool:
        return self._state not in (JobState.QUEUED, JobState.RUNNING)

    def _start(self) -> None:
        with self._changed:
            self._state = JobState.RUNNING

    def _report(self, event: Event) -> None:
        """Passes on what the model reports; the end of the job is the engine's to announce."""
        if isinstance(event, Complete | Error):
            return
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(event)  # what it raises fails this job, like an error of the model

    def _finish(self, last: Complete | Error) -> None:
        """Adds the last event. The listener hears it first: whoever `result` wakes finds it delivered."""
        if self._on_event is not None:
            self._announcer = threading.get_ident()
            try:
                self._on_event(last)
            except BaseException:  # noqa: BLE001 - its listener's trouble must not stop the next job
                _log.exception("the listener of job %d raised at the last event", self.id)
        with self._changed:
            self._events.append(last)
            if isinstance(last, Complete):
                self._state = JobState.COMPLETED
            else:
                cancelled = isinstance(last.error, Cancelled)
                self._state = JobState.CANCELLED if cancelled else JobState.FAILED
            self._announcer = None
            self._changed.notify_all()


class GenerationEngine:
    """Runs requests one after another on a thread of its own.

    `model` is a LoadedModel, which the caller closes, or a loader `(cancel, on_event) -> LoadedModel`, which
    the worker calls at the first job (and at the next one, if it failed) and whose model the engine closes.
    `max_queue`: how many jobs may wait, besides the one that runs; None for any number.
    As a context manager it drains the queue at the end, and cancels it if the block raised.
    """

    def __init__(self, model: LoadedModel | Loader, *, max_queue: int | None = None) -> None:
        is_model = hasattr(model, "generate")
        self._loader = None if is_model else cast("Loader", model)
        self._model = cast("LoadedModel", model) if is_model else None
        self._max_queue = max_queue
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._next_id = 1
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="flux-sd-engine", daemon=True)
        self._worker.start()

    def submit(self, request: GenerationRequest, on_event: OnEvent | None = None) -> Job:
        """Puts a request into the queue. `on_event` is called in the worker thread (for a job cancelled while
        queued: in the thread that cancels). Raises QueueFullError, EngineClosedError."""
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine is shut down and takes no more requests: start another")
            if self._max_queue is not None and len(self._queue) >= self._max_queue:
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, the most that this engine takes: try later"
                )
            job = Job(self, self._next_id, request, on_event)
            self._next_id += 1
            self._queue.append(job)
            self._changed.notify_all()
        return job

    @property
    def waiting(self) -> int:
        """How many jobs are queued, the running one not counted."""
        with self._changed:
            return len(self._queue)

    def shutdown(self, cancel: bool = False, timeout: float | None = None) -> None:
        """Takes no more jobs and waits until all have ended; with `cancel`, ends them as soon as it can.

        Raises TimeoutError if the worker still runs after `timeout` seconds. May be called twice.
        """
        with self._changed:
            self._closed = True
            jobs = [*self._queue, *([self._running] if self._running else [])] if cancel else []
            self._changed.notify_all()
        for job in jobs:
            job.cancel()
        if threading.current_thread() is self._worker:
            return  # called by a listener: the worker ends when this job has
        self._worker.join(timeout)
        if self._worker.is_alive():
            raise TimeoutError(f"the engine is still at work after {timeout} s")

    def __enter__(self) -> GenerationEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel=kind is not None)

    def _withdraw(self, job: Job) -> bool:
        """Takes a job out of the queue; False if it is no longer in it."""
        with self._changed:
            if job not in self._queue:
                return False
            self._queue.remove(job)
            return True

    def _take(self) -> Job | None:
        """The next job, once there is one; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._closed)
            self._running = self._queue.popleft() if self._queue else None
            return self._running

    def _work(self) -> None:
        while (job := self._take()) is not None:
            self._run(job)
            with self._changed:
                self._running = None
            del job  # its pictures are the caller's to keep, not this thread's
        if self._loader is not None and self._model is not None:
            self._model.close()

    def _run(self, job: Job) -> None:
        job._start()
        last: Complete | Error
        try:
            job.token.check()
            if self._model is None:
                assert self._loader is not None
                self._model = self._loader(job.token, job._report)
            last = Complete(self._model.generate(job.request, on_event=job._report, cancel=job.token))
        except Exception as error:  # noqa: BLE001 - whatever it is goes to the job, and the next job must run
            _drop_locals(error)
            last = Error(error)
        except BaseException as error:  # noqa: BLE001 - a listener that exits must not end the worker
            _drop_locals(error)
            last = Error(RuntimeError(f"the run was ended by {type(error).__name__}"))
        job._finish(last)


def _drop_locals(error: BaseException | None) -> None:
    """Empties the frames an error remembers: a kept job must not keep a run's tensors. The traceback stays
    printable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
