"""The queue: turns, positions, cancelling, errors that stay with their job."""

import asyncio
import threading

import pytest

from autolora.console.jobs import Job, JobQueue, Task
from autolora.errors import GenerationError


@pytest.fixture
def queue():
    queue = JobQueue(max_waiting=6, max_per_owner=3)
    yield queue
    queue.close()


class Gate:
    """A task that stands still until it is let go."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.entered.set()
        while not self.open.wait(0.005):
            job.progress(1, 2)
        return "passed"


def task(result: object, log: list | None = None) -> Task:
    def run(job: Job) -> object:
        if log is not None:
            log.append(result)
        if isinstance(result, Exception):
            raise result
        return result

    return Task(str(result), run)


def test_results_come_in_the_order_of_tasks(queue) -> None:
    view = queue.wait(queue.submit("a", [task(1), task(2), task(3)]), 5)
    assert view.state == "done" and view.results == (1, 2, 3) and view.finished


def test_jobs_take_turns_after_each_task(queue) -> None:
    gate, log = Gate(), []
    queue.submit("z", [Task("gate", gate)])
    assert gate.entered.wait(5)
    long = queue.submit("a", [task(name, log) for name in ("a1", "a2", "a3")])
    short = queue.submit("b", [task(name, log) for name in ("b1", "b2")])
    assert [queue.view(job).position for job in (long, short)] == [1, 2]
    assert [job.owner for job in queue.active()] == ["z", "a", "b"]
    gate.open.set()
    queue.wait(long, 5)
    assert log == ["a1", "b1", "a2", "b2", "a3"]


def test_an_error_ends_its_own_job_only(queue, caplog) -> None:
    gate = Gate()
    queue.submit("z", [Task("gate", gate)])
    known = queue.submit("a", [task(GenerationError("No paint left.")), task(2)])
    unknown = queue.submit("b", [task(ZeroDivisionError("secret"))])
    fine = queue.submit("c", [task("picture")])
    gate.open.set()
    assert queue.wait(known, 5).error == "No paint left." and known.results == []
    failed = queue.wait(unknown, 5)
    assert failed.state == "failed" and "secret" not in failed.error
    assert "ZeroDivisionError" in failed.error and "secret" in caplog.text
    assert queue.wait(fine, 5).results == ("picture",)


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_at_its_next_step(queue) -> None:
    gate, log = Gate(), []
    running = queue.submit("a", [Task("gate", gate), task("never", log)])
    waiting = queue.submit("b", [task("never", log)])
    assert gate.entered.wait(5)
    told = threading.Thread(target=queue.wait, args=(waiting, 30))
    told.start()
    assert queue.cancel(waiting) and queue.view(waiting).state == "cancelled"
    told.join(5)
    assert not told.is_alive(), "who waits for it hears of it, though nothing else happens"
    assert queue.cancel(running)
    assert queue.wait(running, 5).state == "cancelled"
    assert queue.wait(queue.submit("c", [task(1)]), 5).results == (1,)
    assert log == [] and not queue.cancel(running)


def test_all_jobs_of_an_owner_are_cancelled_and_nobody_elses(queue) -> None:
    gate = Gate()
    mine = [queue.submit("a", [Task("gate", gate)]), queue.submit("a", [task(1)])]
    other = queue.submit("b", [task(2)])
    assert queue.cancel_owner("a") == 2
    assert {queue.wait(job, 5).state for job in mine} == {"cancelled"}
    assert queue.wait(other, 5).state == "done"


def test_a_full_queue_says_so(queue) -> None:
    gate = Gate()
    first = queue.submit("a", [Task("gate", gate)])
    queue.submit("a", [task(1)])
    queue.submit("a", [task(1)])
    with pytest.raises(GenerationError, match="3 jobs of yours"):
        queue.submit("a", [task(1)])
    for owner in "bcd":
        queue.submit(owner, [task(1)])
    with pytest.raises(GenerationError, match="queue is full"):
        queue.submit("e", [task(1)])
    gate.open.set()
    queue.wait(first, 5)


def test_following_shows_positions_steps_and_the_end(queue) -> None:
    gate = Gate()
    blocker = queue.submit("z", [Task("gate", gate)])
    assert gate.entered.wait(5)

    def draw(job: Job) -> str:
        job.progress(0, 2)
        job.show("preview")
        job.progress(2, 2)
        return "picture"

    job = queue.submit("a", [Task("draw", draw)])

    async def follow() -> list:
        seen = []
        async for view in queue.follow(job, pause=0):
            seen.append(view)
            gate.open.set()
        return seen

    views = asyncio.run(asyncio.wait_for(follow(), 10))
    assert job._watchers == [], "nobody is told who does not listen any more"
    assert views[0].state == "waiting" and views[0].position == 1
    assert views[-1].state == "done" and views[-1].results == ("picture",)
    assert queue.view(blocker).state == "done"


def test_every_task_begins_at_step_nothing(queue) -> None:
    seen = []

    def draw(job: Job) -> None:
        seen.append((job.done, job.total, job.preview))
        job.progress(3, 4)
        job.show("preview")

    queue.wait(queue.submit("a", [Task("one", draw), Task("two", draw)]), 5)
    assert seen == [(0, 0, None)] * 2


def test_a_follower_hears_a_pulse_while_nothing_happens(queue) -> None:
    gate = Gate()
    job = queue.submit("a", [Task("gate", lambda _: gate.open.wait(10))])

    async def follow() -> int:
        count = 0
        async for _ in queue.follow(job, pause=0, pulse=0.01):
            count += 1
            if count == 5:
                gate.open.set()
        return count

    assert asyncio.run(asyncio.wait_for(follow(), 10)) > 5
