"""A queue of jobs that knows positions, takes turns between jobs, and can cancel.

A job is a list of tasks, one picture each. One worker thread runs one task at a time; a job with
tasks left goes to the end of the queue, so that twenty pictures of one person do not keep another
one waiting for all of them. A task that fails ends its own job only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autolora.errors import AutoLoRAError, GenerationError, Message

MAX_WAITING = 64
MAX_PER_OWNER = 4
FINISHED = frozenset({"done", "failed", "cancelled"})
_log = logging.getLogger(__name__)


class JobCancelled(Exception):
    """Raised inside a task at its next step after its job was cancelled."""


@dataclass(frozen=True)
class Task:
    """One part of a job.

    Attributes:
        label: What it makes, for people.
        run: Does it; told of the job so that it can report steps, which is also where a
            cancelled job ends.
    """

    label: str
    run: Callable[[Job], Any]


@dataclass(frozen=True)
class JobView:
    """What there is to see of a job at one moment.

    Attributes:
        id: The job.
        kind: ``pictures``, or what else it is.
        state: ``waiting``, ``running``, ``done``, ``failed`` or ``cancelled``.
        position: 0 when it is running, else how many turns until its next one.
        label: Label of the task that runs or runs next.
        task: Number of that task, from 1.
        tasks: How many there are.
        done: Steps of the task that are done.
        total: Steps of the task; 0 before they are known.
        preview: What the task showed last.
        error: Why it failed, one sentence.
        results: Results of the finished tasks.
        message: Template and values of `error`, for translations; empty where it has none.
    """

    id: int
    kind: str
    state: str
    position: int
    label: str
    task: int
    tasks: int
    done: int
    total: int
    preview: Any
    error: str
    results: tuple[Any, ...]
    message: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINISHED


@dataclass(eq=False)
class Job:
    """A list of tasks on their way through the queue.

    Attributes:
        id: Its number.
        owner: Who asked for it.
        tasks: What is to be done.
        kind: ``pictures``, or what else it is.
    """

    id: int
    owner: str
    tasks: Sequence[Task]
    kind: str = "pictures"
    state: str = "waiting"
    done: int = 0
    total: int = 0
    preview: Any = None
    error: str = ""
    results: list[Any] = field(default_factory=list)
    _cancelled: bool = False
    _watchers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINISHED

    def progress(self, done: int, total: int) -> None:
        """Report steps of the running task.

        Raises:
            JobCancelled: The job was cancelled.
        """
        self.check()
        self.done, self.total = done, total
        self.changed()

    def show(self, preview: Any) -> None:
        """Show what the running task has so far.

        Raises:
            JobCancelled: The job was cancelled.
        """
        self.check()
        self.preview = preview
        self.changed()

    def check(self) -> None:
        """Raise where the job was cancelled.

        Raises:
            JobCancelled: It was.
        """
        if self._cancelled:
            raise JobCancelled

    def changed(self) -> None:
        """Tell those who follow the job."""
        for wake in list(self._watchers):
            wake()


class JobQueue:
    """Runs jobs one task at a time."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_per_owner: int = MAX_PER_OWNER) -> None:
        """Make an empty queue; its thread starts with the first job.

        Args:
            max_waiting: Most jobs in the queue.
            max_per_owner: Most jobs of one owner in the queue.
        """
        self._max_waiting = max_waiting
        self._max_per_owner = max_per_owner
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, owner: str, tasks: Sequence[Task], kind: str = "pictures") -> Job:
        """Put a job at the end of the queue.

        Args:
            owner: Who asks for it.
            tasks: At least one.
            kind: What it is, for those who look at the queue.

        Returns:
            The job.

        Raises:
            GenerationError: The queue is full, altogether or for this owner.
        """
        with self._changed:
            active = self._active()
            if len(active) >= self._max_waiting:
                raise GenerationError(
                    "The queue is full ({} jobs); try again in a minute.", len(active)
                )
            if sum(job.owner == owner for job in active) >= self._max_per_owner:
                raise GenerationError(
                    "{} jobs of yours are in the queue already; wait for one of them, or stop it.",
                    self._max_per_owner,
                )
            job = Job(next(self._numbers), owner, tuple(tasks), kind)
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> bool:
        """End a job: at once where it waits, at its next step where it runs.

        Returns:
            Whether there was anything to end.
        """
        with self._changed:
            if job.finished:
                return False
            job._cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "cancelled"
        self._tell_all(job)
        return True

    def cancel_owner(self, owner: str) -> int:
        """End all jobs of one owner.

        Returns:
            How many there were.
        """
        with self._changed:
            jobs = [job for job in self._active() if job.owner == owner]
        return sum(self.cancel(job) for job in jobs)

    def view(self, job: Job) -> JobView:
        """Look at a job."""
        with self._changed:
            waiting = list(self._waiting)
            position = waiting.index(job) + 1 if job in waiting else 0
            number = min(len(job.results), len(job.tasks) - 1)
            return JobView(
                job.id,
                job.kind,
                job.state,
                position,
                job.tasks[number].label,
                number + 1,
                len(job.tasks),
                job.done,
                job.total,
                job.preview,
                job.error,
                tuple(job.results),
                job.error.to_dict() if isinstance(job.error, Message) else {},
            )

    def active(self) -> list[Job]:
        """Jobs that are not finished: the running one first, then in the order of their turns."""
        with self._changed:
            return self._active()

    def wait(self, job: Job, timeout: float | None = None) -> JobView:
        """Block until a job is finished.

        Raises:
            TimeoutError: It was not within the time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: job.finished, timeout):
                raise TimeoutError(f"Job {job.id} is not finished after {timeout} seconds.")
        return self.view(job)

    async def follow(
        self, job: Job, pause: float = 0.05, pulse: float = 2.0
    ) -> AsyncGenerator[JobView, None]:
        """Give a view whenever the job changed; the last one is of the finished job.

        Args:
            job: The job.
            pause: Shortest time between two views in seconds.
            pulse: Longest time between two views, so that a listener can look whether anybody is
                still listening to it.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(woken.set)

        job._watchers.append(wake)
        try:
            while True:
                woken.clear()
                view = self.view(job)
                yield view
                if view.finished:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(woken.wait(), pulse)
                await asyncio.sleep(pause)
        finally:
            job._watchers.remove(wake)

    def close(self) -> None:
        """End everything and the thread."""
        with self._changed:
            self._closed = True
            jobs = self._active()
            self._changed.notify_all()
        for job in jobs:
            self.cancel(job)

    def _active(self) -> list[Job]:
        return ([self._running] if self._running is not None else []) + list(self._waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state, job.done, job.total = "running", 0, 0
            self._tell_all(job)
            state = self._run_task(job)
            with self._changed:
                self._running = None
                job.preview = None
                job.state = "cancelled" if job._cancelled and state == "waiting" else state
                if job.state == "waiting":
                    self._waiting.append(job)
            self._tell_all(job)

    def _run_task(self, job: Job) -> str:
        """Run the next task of a job; return the job's state after it."""
        try:
            job.check()
            job.results.append(job.tasks[len(job.results)].run(job))
        except JobCancelled:
            return "cancelled"
        except AutoLoRAError as error:
            job.error = error.message
            return "failed"
        except Exception as error:
            _log.exception("Job %d failed", job.id)
            job.error = unexpected(error)
            return "failed"
        return "waiting" if len(job.results) < len(job.tasks) else "done"

    def _tell_all(self, job: Job) -> None:
        """Positions of others change with a job, so everybody who follows a job is notified."""
        with self._changed:
            self._changed.notify_all()
            others = self._active()
        for other in {*others, job}:
            other.changed()


def unexpected(error: Exception) -> Message:
    """One sentence about an error that nobody thought of; its text may be a secret."""
    name = type(error).__name__
    return Message("Something unexpected went wrong ({}); the server's log has the details.", name)
