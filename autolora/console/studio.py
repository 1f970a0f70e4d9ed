"""What the page and the HTTP interface share: planning, drawing, history, the pool's index."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.console.cards import Card, Plan, SearchDesk, make_plan
from autolora.console.catalog import Catalog, Covers
from autolora.console.history import Entry, Picture, PictureStore, Visits
from autolora.console.jobs import Job, JobCancelled, JobQueue, JobView, Task, unexpected
from autolora.console.models import ServerRequest, request_of_report
from autolora.console.settings import settings_in
from autolora.errors import AutoLoRAError, GenerationError, PoolError
from autolora.lora import Pool
from autolora.prompt_syntax import escape
from autolora.request import settle
from autolora.styles import Style, Styles, shipped_styles
from autolora.unit import check_steps

if TYPE_CHECKING:
    from PIL.Image import Image

    from autolora.generate.report import Report
    from autolora.lora.pool import PoolEntry
    from autolora.pipeline import AutoLoRAPipeline

SYSTEM = "server"
FUSED = "fused"
PREVIEW_SIDE = 512
PREVIEWS = 8


@dataclass(frozen=True)
class Look:
    """A preview of a picture on its way.

    Attributes:
        step: Denoising steps that are done.
        image: The guess of the finished picture, at most `PREVIEW_SIDE` pixels.
    """

    step: int
    image: Image


class Studio:
    """One pipeline with a queue, a catalog of its pool, styles, pictures and histories."""

    def __init__(
        self,
        pipe: AutoLoRAPipeline,
        outputs: Path,
        styles: Path | None = None,
        queue: JobQueue | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            pipe: The pipeline; nobody else may attach adapters to it.
            outputs: Folder for pictures.
            styles: Folder for saved styles; by default ``styles`` in the output folder.
            queue: The queue of jobs; a new one by default.
        """
        self.pipe = pipe
        self.queue = JobQueue() if queue is None else queue
        self.catalog = Catalog(lambda: pipe.pool)
        self.desk = SearchDesk(self.catalog, self._follow_pool)
        self.styles = Styles([shipped_styles()], styles or outputs / "styles")
        self.pictures = PictureStore(outputs)
        self.covers = Covers(outputs / ".covers")
        self.visits = Visits()
        self.problem = ""
        self._indexing: Job | None = None
        self._failed: tuple[PoolEntry, ...] | None = None
        self._indexing_lock = threading.Lock()

    # Cards

    def plan(self, asked: ServerRequest) -> Plan:
        """Decide which adapters a picture would take.

        Args:
            asked: The request; its prompt may be empty.

        Returns:
            The plan; an index that is not there yet finds nothing and says so in the notes.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        notes = self._look_at_pool()
        style = self.styles.get(asked.style)
        plan = make_plan(self.desk, self.catalog, style, asked, self.pipe.config)
        plan.notes[:0] = notes
        return plan

    def _look_at_pool(self) -> list[str]:
        try:
            self.desk.look()
        except PoolError as error:
            self.problem = str(error)
        if self.desk.ready:
            return []
        return [self.problem or f"The index of the pool is being built{self._how_far()}."]

    def _how_far(self) -> str:
        job = self._indexing
        return f" ({job.done} of {job.total})" if job is not None and job.total else ""

    @property
    def is_indexing(self) -> bool:
        """Whether the index is being brought up to date, or about to be."""
        return self._indexing is not None and not self._indexing.finished

    # Pictures

    def submit(self, order: ServerRequest, owner: str, visit: str = "") -> Job:
        """Put an order into the queue.

        Args:
            order: The request.
            owner: Who may cancel it.
            visit: Whose history the pictures go to; empty for nobody's.

        Returns:
            The job; its results are `Picture`.

        Raises:
            AutoLoRAError: Something that was asked for is not possible; nothing was queued.
        """
        order = order.with_seed()
        plan = self.plan(order)
        self._check(order, plan)
        tasks = self._tasks(order, plan, visit)
        return self.queue.submit(owner, tasks)

    async def run(
        self, order: ServerRequest, owner: str, visit: str = ""
    ) -> AsyncGenerator[JobView, None]:
        """Queue an order and give a view whenever something changed.

        An index that is still to be built is waited for first. Whoever stops listening before the
        end, such as a browser that was closed, ends the job.

        Args:
            order: As for `submit`.
            owner: As for `submit`.
            visit: As for `submit`.

        Raises:
            AutoLoRAError: As for `submit`.
        """
        indexing = self.indexing() if order.retrieve else None
        if indexing is not None:
            async with aclosing(self.queue.follow(indexing)) as views:
                async for view in views:
                    if not view.finished:
                        yield view
        job = await asyncio.to_thread(self.submit, order, owner, visit)
        try:
            async with aclosing(self.queue.follow(job)) as views:
                async for view in views:
                    yield view
        finally:
            self.queue.cancel(job)

    def indexing(self) -> Job | None:
        """The job that has to end before anything can be found; None where none helps."""
        if self.desk.ready or self.pool() is None:
            return None
        if self._failed is not None and self._failed == self.catalog.entries:
            return None  # it would fail again
        running = self._indexing
        return self.reindex() if running is None or running.finished else running

    def _check(self, order: ServerRequest, plan: Plan) -> None:
        """Find what is wrong before anything is queued."""
        from autolora.fusion import get_strategy

        get_strategy(plan.strategy)
        request = settle(self.pipe.config, plan.style.apply(order))
        check_steps([card.pick.unit for card in plan.cards], request.steps)
        if not plan.prompt:
            raise GenerationError("The prompt has nothing but LoRA tags; add a few words to it.")

    def _tasks(self, order: ServerRequest, plan: Plan, visit: str) -> list[Task]:
        """One task per picture; a comparison draws the fused picture first."""
        draw = partial(self._draw, order, plan, visit)
        if not order.compare or not plan.cards:
            return [Task("", partial(draw, order.seed + n)) for n in range(order.count)]
        rivals = [(f"only {card.item.name}", [card]) for card in plan.cards]
        rivals = rivals if len(rivals) > 1 else []
        groups = [(FUSED, plan.cards), *rivals, ("no adapters", [])]
        return [
            Task(label, partial(draw, order.seed, label=label, cards=cards))
            for label, cards in groups
        ]

    def _draw(
        self,
        order: ServerRequest,
        plan: Plan,
        visit: str,
        seed: int,
        job: Job,
        label: str = "",
        cards: list[Card] | None = None,
    ) -> Picture:
        """Draw one picture of an order and keep it."""
        taking = plan.cards if cards is None else cards
        wanted = plan.style.apply(order).changed(
            style="", seed=seed, count=1, strategy=plan.strategy
        )
        if cards is not None and job.results:
            # All pictures of a comparison read what the first one read.
            read = job.results[0].report["used_prompt"]
            wanted = wanted.changed(prompt=escape(read), use_triggers=False)
        output = self.pipe.generate_many(
            wanted,
            [seed],
            picks=[card.pick for card in taking],
            progress=job.progress,
            preview=lambda step, image: job.show(_look(step, image)),
            preview_every=max(1, (order.steps or self.pipe.config.steps) // PREVIEWS),
        )[0]
        _explain(output.report, taking, plan.notes)
        picture = self.pictures.add(output, label)
        if visit:
            # What differs from the order in a comparison is known to the picture only.
            again = order.without_images().changed(seed=seed, count=1, compare=False)
            if label not in ("", FUSED):
                again = request_of_report(output.report)
            self.visits.add(visit, Entry(picture, again.to_dict()))
        return picture

    def settings_in(self, data: bytes) -> dict[str, Any]:
        """Read the settings in a picture or a text of generation parameters that somebody gave.

        Args:
            data: A file: of AutoLoRA or another program.

        Returns:
            ``order`` for the form, ``model`` and ``program`` that made it, the names that are
            ``missing`` from the pool, and ``notes``.

        Raises:
            GenerationError: It holds no settings that are understood.
        """
        return settings_in(data, self.pool(), self.pipe.config)

    # The pool

    def reindex(self, rebuild: bool = False, owner: str = SYSTEM) -> Job:
        """Queue bringing the search index up to date.

        Args:
            rebuild: Encode every file again.
            owner: Who asked for it.

        Returns:
            The job, or one that waits already and will see the same files; its result says what
            was done.
        """
        with self._indexing_lock:
            before = self._indexing
            if before is not None and before.state == "waiting" and not rebuild:
                return before
            task = Task("index", lambda job: self._index(job, rebuild))
            self._indexing = self.queue.submit(owner, [task], "index")
            self.problem = ""
            return self._indexing

    def _follow_pool(self) -> None:
        """Bring the index up to the pool's files, unless it was tried with the same ones."""
        if not self.is_indexing and self.catalog.entries != self._failed:
            with contextlib.suppress(GenerationError):  # a full queue: the next look tries again
                self.reindex()

    def _index(self, job: Job, rebuild: bool) -> dict[str, Any]:
        try:
            state = self.pipe.index(rebuild, job.progress)
        except JobCancelled:
            raise
        except Exception as error:
            known = isinstance(error, AutoLoRAError)
            self.problem = str(error) if known else unexpected(error)
            self._failed = self.catalog.entries
            raise
        self.problem, self._failed = "", None
        self.desk.use(state)
        self.catalog.refresh()
        counts = {"loras": state.size, "encoded": state.encoded, "kept": state.kept}
        return {**vars(state.report), **counts}

    def warm_up(self) -> None:
        """Queue what makes the first picture slow: the index, the base model."""

        def load(job: Job) -> None:
            _ = self.pipe.base, self.pipe.gates

        try:
            self.catalog.refresh()
        except PoolError as error:
            self.problem = str(error)
        else:
            self.reindex()
        self.queue.submit(SYSTEM, [Task("base model", load)], "load")

    def pool(self) -> Pool | None:
        """The pool, or None as long as there is none."""
        try:
            return self.pipe.pool
        except PoolError:
            return None

    # Styles

    def save_style(
        self, name: str, title: str, order: ServerRequest, overwrite: bool = False
    ) -> Style:
        """Save the adapters that an order would take as a style.

        Args:
            name: Name of the style's file.
            title: What people read; the name where it is empty.
            order: Settings of the form; without a prompt only what is pinned is saved.
            overwrite: Whether a saved style of that name may be replaced.

        Returns:
            The style.

        Raises:
            AutoLoRAError: There is nothing to save, or the name cannot be used.
        """
        base = self.styles.get(order.style)
        plan = self.plan(order)
        if not plan.cards:
            raise PoolError("There is no adapter to save; pin one, or type what finds one.")
        style = Style(
            name,
            {"en": title or name, "zh": title or name},
            base.prompt,
            base.negative_prompt,
            tuple(replace(card.pick.unit, strength=card.strength) for card in plan.cards),
            plan.strategy,
            order.retrieve,
        )
        self.styles.save(style, overwrite)
        return style


def _look(step: int, image: Image) -> Look:
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return Look(step, small)


def _explain(report: Report, cards: list[Card], notes: list[str]) -> None:
    """Say in a report how well adapters that were named fit, and what the plan noted."""
    found = {card.item.name: card.hit for card in cards}
    for used in report.adapters:
        if hit := found.get(used.name):
            used.score = round(hit.score, 4)
            used.channels = {name: round(p, 4) for name, p in hit.channels.items()}
    report.notes = list(dict.fromkeys([*notes, *report.notes]))
