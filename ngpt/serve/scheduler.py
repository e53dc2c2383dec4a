"""Decodes all requests in one batch, in a thread: choices join it when a slot is free, and leave it when they end.

A choice waits in a queue of limited length. Each step gives every running choice one token. What is new goes to the
listener of its request, in the thread of the event loop.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ngpt.config.secrets import redact
from ngpt.generation.batch import StepResult
from ngpt.generation.sampling import Sampling
from ngpt.serve.choice import Choice, Piece, TokenLogprob
from ngpt.serve.engine import Engine
from ngpt.serve.metrics import Metrics
from ngpt.serve.schema import RATE_LIMIT, SERVER, ApiError
from ngpt.system.cli import print_lines

MOST_FAILURES = 3  # steps in a row that raise, until the server is no longer healthy
LONGEST_WAIT = 60  # seconds that a refused client is asked to wait, at most


class Event(NamedTuple):
    """Something new of one choice, by its number in the request: text, the scores of its prompt, or an error."""

    choice: int
    what: Piece | ApiError | list[TokenLogprob]


@dataclass(eq=False)
class Task:
    """One choice on its way through the scheduler."""

    index: int
    prompt: list[int]
    sampling: Sampling
    seed: int | None
    choice: Choice
    logprobs: int | None
    scored_offsets: list[int] | None  # where each token of the prompt begins in the text, if they are to be scored
    listener: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False  # has a first token
    cancelled: bool = False


class Scheduler:
    """Runs tasks. All methods may be called from any thread."""

    def __init__(
        self, engine: Engine, *, queue: int, metrics: Metrics, deliver: Callable[[Callable[[], None]], None]
    ) -> None:
        """`deliver` calls a function in the thread that listens; `queue` tasks may wait for a slot."""
        self._engine, self._metrics, self._deliver = engine, metrics, deliver
        self.slots = engine.decoder.slots
        self.capacity = self.slots + queue
        self._change = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._running: dict[int, Task] = {}
        self._ends = False
        self._refusal: ApiError | None = None  # of new tasks
        self._failures = 0
        self._seconds = 1.0  # that a task takes, an average over the last ones
        self._news: list[tuple[Task, Event]] = []
        metrics.follow(lambda: len(self._running), lambda: len(self._waiting), self.slots)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread runs, and its last steps have not all failed."""
        return self._thread.is_alive() and self._failures < MOST_FAILURES

    @property
    def is_idle(self) -> bool:
        """Whether no task runs or waits."""
        with self._change:
            return not self._running and not self._waiting

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queues tasks, all or none.

        Raises:
            ApiError: 429 if there are too many, 503 if the server ends.
        """
        with self._change:
            if self._refusal is not None:
                raise self._refusal
            present = len(self._running) + len(self._waiting)
            if present + len(tasks) > self.capacity:
                seconds = min(LONGEST_WAIT, max(1, round(self._seconds * (present / self.slots))))
                message = f"{present} choices run or wait, of at most {self.capacity}; try again in {seconds} s"
                headers = {"Retry-After": str(seconds)}
                raise ApiError(429, message, kind=RATE_LIMIT, code="rate_limit_exceeded", headers=headers)
            self._waiting.extend(tasks)
            self._change.notify()

    def cancel(self, tasks: Sequence[Task]) -> None:
        """Ends tasks whose answer nobody waits for; a slot is free before the next step."""
        with self._change:
            for task in tasks:
                task.cancelled = True
                if task in self._waiting:
                    self._waiting.remove(task)
                    self._note_end(task, "cancelled")
            self._change.notify()

    def close(self) -> None:
        """Refuses new tasks; those that run and wait go on."""
        with self._change:
            self._refusal = self._refusal or closing()

    def stop(self) -> int:
        """Ends the thread after its current step; tasks that are left get an error. Returns their number."""
        with self._change:
            self._refusal, self._ends = self._refusal or closing(), True
            self._change.notify()
        self._thread.join()
        left = [*self._running.values(), *self._waiting]
        self._fail(left)
        self._running.clear()
        self._waiting.clear()
        self._send_news()
        return len(left)

    def _run(self) -> None:
        """Runs steps until `stop`. If that fails, all requests get an error instead of no answer."""
        try:
            while self._take_step():
                pass
        except BaseException as error:
            self._report(error)
            with self._change:
                self._refusal = broken()
                self._fail([*self._running.values(), *self._waiting])
                self._running.clear()
                self._waiting.clear()
            self._send_news()

    def _take_step(self) -> bool:
        """Waits for tasks and gives each a token; False once the scheduler is stopped."""
        with self._change:
            self._change.wait_for(lambda: self._ends or self._waiting or self._running)
            if self._ends:
                return False
            added = self._next_tasks()
        for task in added:
            self._start(task)
        if self._running:
            self._decode()
        self._send_news()
        return True

    def _next_tasks(self) -> list[Task]:
        """Frees the slots of cancelled tasks, and takes tasks from the queue for the slots that are free.

        The prompts of one step have together at most as many tokens as the context, or there is only one. So running
        choices do not wait for long until all prompts of a burst are encoded.
        """
        for slot in [slot for slot, task in self._running.items() if task.cancelled]:
            self._leave(slot, "cancelled")
        taken, room = list[Task](), self._engine.context
        while len(taken) < self._engine.decoder.free_slots and self._waiting:
            room -= len(self._waiting[0].prompt)
            if taken and room < 0:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _leave(self, slot: int, reason: str) -> None:
        task = self._running.pop(slot)
        self._engine.decoder.free(slot)
        self._note_end(task, reason)

    def _note_end(self, task: Task, reason: str) -> None:
        seconds = time.monotonic() - task.arrived
        self._metrics.choices.labels(reason).inc()
        self._metrics.choice_seconds.observe(seconds)
        if reason != "cancelled":
            self._seconds += 0.1 * (seconds - self._seconds)

    def _start(self, task: Task) -> None:
        """Scores the prompt of a task if that was asked for, and adds it to the batch if it has tokens to generate."""
        try:
            if task.scored_offsets is not None:
                scores = self._engine.score(task.prompt, task.logprobs or 0, task.scored_offsets)
                self._news.append((task, Event(task.index, scores)))
            if (reason := task.choice.finish_reason) is None:
                decoder = self._engine.decoder
                slot = decoder.add(task.prompt, task.sampling, task.seed, logprobs=task.logprobs)
                self._running[slot] = task
            else:
                self._news.append((task, Event(task.index, Piece(finish_reason=reason))))
                self._note_end(task, reason)
            self._metrics.prompt_tokens.inc(len(task.prompt))
        except Exception as error:  # of this task alone, such as too little memory for its scores
            self._report(error)
            self._fail([task])

    def _decode(self) -> None:
        """Gives each running task its next token."""
        try:
            results = self._engine.decoder.step()
            self._failures = 0
        except Exception as error:  # of any kind: each task is told, and the server goes on
            self._failures += 1
            self._report(error)
            self._fail([*self._running.values()])
            for slot in self._running:
                self._engine.decoder.free(slot)
            self._running.clear()
            return
        self._metrics.steps.inc()
        self._metrics.generated_tokens.inc(len(results))
        for result in results:
            self._take_result(result)

    def _take_result(self, result: StepResult) -> None:
        """Adds a token to its choice, and frees the slot if that ends it."""
        task = self._running[result.slot]
        if not task.started:
            task.started = True
            self._metrics.first_token.observe(time.monotonic() - task.arrived)
        try:
            piece = task.choice.add(result.token, result.logprob or 0.0, result.top_logprobs)
        except Exception as error:  # the tokenizer cannot decode the token
            self._report(error)
            self._news.append((task, Event(task.index, broken())))
            self._leave(result.slot, "error")
            return
        if piece is not None:
            self._news.append((task, Event(task.index, piece)))
        if task.choice.finish_reason is not None:
            self._leave(result.slot, task.choice.finish_reason)

    def _fail(self, tasks: Sequence[Task]) -> None:
        """Lets tasks end with an error."""
        for task in tasks:
            self._news.append((task, Event(task.index, self._refusal or broken())))
            self._note_end(task, "error")

    def _report(self, error: BaseException) -> None:
        print_lines(redact("".join(traceback.format_exception(error))).rstrip("\n"))

    def _send_news(self) -> None:
        news, self._news = self._news, []

        def tell() -> None:
            for task, event in news:
                if not task.cancelled:
                    task.listener(event)

        if news:
            self._deliver(tell)


def closing() -> ApiError:
    """The server ends, and takes no more requests."""
    return ApiError(503, "the server is shutting down", kind=SERVER, code="shutting_down", headers={"Retry-After": "5"})


def broken() -> ApiError:
    """A step has failed; the operator sees why."""
    return ApiError(500, "the model failed; the log of the server says why", kind=SERVER)
