"""The queue and its worker: order, one last event each, cancel in every state, failures, shutdown."""

from __future__ import annotations

import ast
import gc
import logging
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_flux
import helpers_sd
import pytest
import torch
from helpers_front import FakeModel, order
from helpers_source import PACKAGE, tree

from flux_sd.errors import Cancelled, NonFiniteError, RequestError
from flux_sd.generation_engine import (
    EngineClosedError,
    GenerationEngine,
    Job,
    JobState,
    QueueFullError,
)
from flux_sd.model_loader import Model
from flux_sd.request import CancelToken, Complete, Error, Event, GenerationRequest, Preview, Progress, Result
from flux_sd.versions import SDVersion

PATIENCE = 20.0  # seconds; only a broken engine takes them


class GatedModel(FakeModel):
    """Stops inside `generate` until `gate` is set, and says when it got there."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_event: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
    ) -> list[Result]:
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        return super().generate(request, on_event=on_event, cancel=cancel)


def last_events(job: Job) -> list[Event]:
    return [event for event in job.events() if isinstance(event, Complete | Error)]


def test_events_come_in_order_and_end_with_one_complete() -> None:
    heard: list[Event] = []
    with GenerationEngine(FakeModel()) as engine:
        job = engine.submit(order(steps=3, batch=2, preview_every=1), heard.append)
        results = job.result(PATIENCE)
    assert [(e.image, e.index) for e in heard if isinstance(e, Progress)] == [
        (i, n) for i in (0, 1) for n in (1, 2, 3)
    ]
    assert sum(isinstance(e, Preview) for e in heard) == 6
    assert heard == list(job.events()) and last_events(job) == [heard[-1]]
    assert isinstance(heard[-1], Complete) and heard[-1].results == results
    assert [r.metadata["seed"] for r in results] == [7, 8] and job.state is JobState.COMPLETED


def test_jobs_run_one_after_another_in_the_order_of_submission() -> None:
    model = FakeModel()
    with GenerationEngine(model) as engine:
        jobs = [engine.submit(order(str(i))) for i in range(5)]
    assert [r.prompt for r in model.requests] == ["0", "1", "2", "3", "4"]
    assert [job.id for job in jobs] == [1, 2, 3, 4, 5] and model.closed == 0


def test_events_can_be_followed_while_the_job_runs() -> None:
    model = GatedModel()
    with GenerationEngine(model) as engine:
        job = engine.submit(order())
        assert model.entered.wait(PATIENCE) and job.state is JobState.RUNNING
        followed: list[Event] = []
        follower = threading.Thread(target=lambda: followed.extend(job.events()))
        follower.start()
        model.gate.set()
        follower.join(PATIENCE)
    assert len(followed) == 5 and isinstance(followed[-1], Complete)


def test_cancelling_a_queued_job_ends_it_at_once_and_the_others_run() -> None:
    model = GatedModel()
    with GenerationEngine(model) as engine:
        first, second, third = (engine.submit(order(name)) for name in ("first", "second", "third"))
        assert model.entered.wait(PATIENCE)
        second.cancel()
        assert second.state is JobState.CANCELLED and engine.waiting == 1
        with pytest.raises(Cancelled):
            second.result(0)
        model.gate.set()
    assert [r.prompt for r in model.requests] == ["first", "third"]
    assert len(last_events(second)) == 1 and first.state is third.state is JobState.COMPLETED


def test_cancelling_a_running_job_leaves_the_next_run_as_it_would_be_alone() -> None:
    model = FakeModel()
    with GenerationEngine(model) as engine:
        alone = engine.submit(order("pizza", batch=2)).result(PATIENCE)
        job: list[Job] = []
        seen = threading.Event()

        def stop_at_two(event: Event) -> None:
            assert seen.wait(PATIENCE)
            if isinstance(event, Progress) and event.index == 2:
                job[0].cancel()

        job.append(engine.submit(order("stop me", steps=1000), stop_at_two))
        seen.set()
        with pytest.raises(Cancelled):
            job[0].result(PATIENCE)
        again = engine.submit(order("pizza", batch=2)).result(PATIENCE)
    assert job[0].state is JobState.CANCELLED and len(last_events(job[0])) == 1
    assert sum(isinstance(e, Progress) for e in job[0].events()) == 2
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(alone, again, strict=True))


def test_cancelling_after_the_end_changes_nothing() -> None:
    with GenerationEngine(FakeModel()) as engine:
        job = engine.submit(order())
        results = job.result(PATIENCE)
        job.cancel()
        assert job.result(0) == results and job.state is JobState.COMPLETED and len(last_events(job)) == 1


@pytest.mark.parametrize(("prompt", "kind"), [("fail", RuntimeError), ("nan", NonFiniteError)])
def test_a_failed_job_reports_its_error_and_the_next_one_runs(prompt: str, kind: type[Exception]) -> None:
    with GenerationEngine(FakeModel()) as engine:
        bad, good = engine.submit(order(prompt)), engine.submit(order())
        with pytest.raises(kind):
            bad.result(PATIENCE)
        assert good.result(PATIENCE) and bad.state is JobState.FAILED
    (last,) = last_events(bad)
    assert isinstance(last, Error) and isinstance(last.error, kind)


def test_a_kept_failed_job_keeps_no_tensor_of_its_run() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    class Hoarder(FakeModel):
        def generate(self, request: GenerationRequest, **_: Any) -> list[Result]:
            activations = torch.zeros(8)
            kept.append(weakref.ref(activations))
            raise RuntimeError("out of memory")

    with GenerationEngine(Hoarder()) as engine:
        job = engine.submit(order())
        with pytest.raises(RuntimeError, match="out of memory"):
            job.result(PATIENCE)
    gc.collect()
    assert kept[0]() is None and job.state is JobState.FAILED


def test_a_listener_that_raises_fails_its_own_job_only() -> None:
    def broken(event: Event) -> None:
        raise ValueError("no room on the screen")

    logging.getLogger("flux_sd.generation_engine").disabled = True
    with GenerationEngine(FakeModel()) as engine:
        job = engine.submit(order(), broken)
        with pytest.raises(ValueError, match="no room"):
            job.result(PATIENCE)
        assert engine.submit(order()).result(PATIENCE)
    logging.getLogger("flux_sd.generation_engine").disabled = False
    assert len(last_events(job)) == 1


@pytest.mark.parametrize("queued", [False, True])
def test_a_listener_that_waits_for_its_own_job_is_told_so_at_once(queued: bool) -> None:
    raised: list[BaseException] = []

    def listener(event: Event) -> None:
        if isinstance(event, Complete | Error):
            for wait in (lambda: job.result(PATIENCE), lambda: list(job.events())):
                with pytest.raises(RuntimeError, match="was waited for by a listener") as caught:
                    wait()
                raised.append(caught.value)

    model = GatedModel()
    with GenerationEngine(model) as engine:
        first = engine.submit(order())
        assert model.entered.wait(PATIENCE)
        job = engine.submit(order(), listener)  # the listener runs here when it is cancelled in the queue
        if queued:
            job.cancel()
        model.gate.set()
        first.result(PATIENCE)
    assert job.state is (JobState.CANCELLED if queued else JobState.COMPLETED)
    assert len(raised) == 2 and "Complete event's results" in str(raised[0])


def test_a_loader_is_called_once_in_the_worker_and_its_model_closed() -> None:
    model, calls = FakeModel(), list[str]()

    def load(cancel: CancelToken, on_event: Callable[[Event], None]) -> FakeModel:
        calls.append(threading.current_thread().name)
        if len(calls) == 1:
            raise OSError("disk is away")
        on_event(Progress("load", 1, 1))
        return model

    with GenerationEngine(load) as engine:
        first, second, third = (engine.submit(order()) for _ in range(3))
        with pytest.raises(OSError, match="away"):
            first.result(PATIENCE)
        assert second.result(PATIENCE) and third.result(PATIENCE)
    assert calls == ["flux-sd-engine"] * 2 and model.closed == 1
    assert next(second.events()) == Progress("load", 1, 1)


def test_a_bounded_queue_refuses_one_too_many_and_takes_more_later() -> None:
    model = GatedModel()
    with GenerationEngine(model, max_queue=1) as engine:
        engine.submit(order())
        assert model.entered.wait(PATIENCE)
        waiting = engine.submit(order())
        with pytest.raises(QueueFullError, match="1 requests wait"):
            engine.submit(order())
        waiting.cancel()
        replacement = engine.submit(order())
        model.gate.set()
        assert replacement.result(PATIENCE)


def test_shutdown_drains_and_then_refuses() -> None:
    engine = GenerationEngine(FakeModel())
    jobs = [engine.submit(order("slow", steps=1)) for _ in range(3)]
    engine.shutdown()
    assert all(job.state is JobState.COMPLETED for job in jobs)
    engine.shutdown()
    with pytest.raises(EngineClosedError):
        engine.submit(order())


def test_shutdown_with_cancel_ends_running_and_queued_jobs() -> None:
    engine = GenerationEngine(FakeModel())
    jobs = [engine.submit(order("slow", steps=1000)) for _ in range(3)]
    next(jobs[0].events())
    engine.shutdown(cancel=True, timeout=PATIENCE)
    assert [job.state for job in jobs] == [JobState.CANCELLED] * 3
    assert all(len(last_events(job)) == 1 for job in jobs)


def test_shutdown_says_when_the_worker_is_still_at_work() -> None:
    model = GatedModel()
    engine = GenerationEngine(model)
    job = engine.submit(order())
    with pytest.raises(TimeoutError):
        engine.shutdown(timeout=0.01)
    with pytest.raises(TimeoutError, match="job 1"):
        job.result(0.01)
    model.gate.set()
    engine.shutdown(timeout=PATIENCE)
    assert job.result(0)


def test_an_error_in_the_block_cancels_the_queue() -> None:
    with pytest.raises(KeyError), GenerationEngine(FakeModel()) as engine:
        job = engine.submit(order("slow", steps=1000))
        raise KeyError
    assert job.state is JobState.CANCELLED


def test_many_threads_submitting_and_cancelling_lose_no_job() -> None:
    model = FakeModel()
    jobs: list[Job] = []
    with GenerationEngine(model) as engine:

        def user(number: int) -> None:
            for i in range(10):
                job = engine.submit(order(steps=1))
                jobs.append(job)
                if (i + number) % 3 == 0:
                    job.cancel()

        users = [threading.Thread(target=user, args=(n,)) for n in range(6)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join(PATIENCE)
    assert sorted(job.id for job in jobs) == list(range(1, 61))
    assert all(len(last_events(job)) == 1 for job in jobs)
    completed = sum(job.state is JobState.COMPLETED for job in jobs)
    assert completed >= 30 and completed + sum(job.state is JobState.CANCELLED for job in jobs) == 60


# ------------------------------------------------------------------------------------------ either family


def small_models(folder: Path) -> dict[str, Model]:
    """A small FLUX and small Stable Diffusion models of random weights."""
    flux = helpers_flux.small_info()
    made = {"flux": helpers_flux.open_model(helpers_flux.write_folder(folder / "flux", flux), flux)}
    for key in ("sd15", "sdxl-inpaint"):
        info = helpers_sd.small_info(SDVersion.parse(key))
        made[key] = helpers_sd.open_model(helpers_sd.write_folder(folder / key, info), info)
    return made


def test_either_family_runs_behind_the_same_engine(tmp_path: Path) -> None:
    painted = {"init_image": helpers_sd.picture(), "mask": helpers_sd.half_mask()}
    asked = order("a kite", steps=3, width=48, height=32, batch=2, preview_every=3)
    jobs: list[Job] = []

    def stop_at_two(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.index == 2:
            jobs[-1].token.cancel()

    for key, model in small_models(tmp_path).items():
        wanted = replace(asked, **painted) if key.endswith("inpaint") else asked
        gate = threading.Event()
        with GenerationEngine(model) as engine:
            engine.submit(replace(wanted, steps=1, batch=1), lambda _, gate=gate: gate.wait(PATIENCE))
            jobs.append(engine.submit(wanted, stop_at_two))
            gate.set()
            refused, finished = engine.submit(replace(wanted, width=50)), engine.submit(wanted)
            results = finished.result(PATIENCE)
        assert jobs[-1].state is JobState.CANCELLED and refused.state is JobState.FAILED, key
        (last,) = last_events(refused)
        assert isinstance(last, Error) and isinstance(last.error, RequestError)
        heard = list(finished.events())
        steps = [(e.image, e.index) for e in heard if isinstance(e, Progress) and e.stage == "denoise"]
        assert steps == [(i, n) for i in (0, 1) for n in (1, 2, 3)], key
        assert sum(isinstance(event, Preview) for event in heard) == 2
        alone = model.generate(wanted)  # without an engine, and after a run that was cancelled
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(results, alone, strict=True)), key
        model.close()


def test_engine_and_command_line_do_not_ask_for_the_family() -> None:
    asks = re.compile(r"\.family\b|\bis_flux\b|\.is_xl\b|\b(FluxRun|SdRun|LoadedSd)\b")
    for path in [PACKAGE / "generation_engine.py", *(PACKAGE / "cli").glob("*.py")]:
        for node in ast.walk(tree(path)):
            found = ast.unparse(node.test) if isinstance(node, ast.If | ast.IfExp | ast.While) else ""
            found = ast.unparse(node.subject) if isinstance(node, ast.Match) else found
            assert not asks.search(found), f"{path.name}:{node.lineno} branches on {found}"
