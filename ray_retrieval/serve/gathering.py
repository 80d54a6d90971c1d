"""Questions that come one at a time, worked on together: what comes meanwhile is the next batch.

An idle worker begins at once, or waits a little for company if it is told to; a busy one finds a batch when
it is done. So a lone question is not held up, and the more come, the larger are the batches.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Gathering(Generic[Question, Answer]):
    """Gathers the questions of one event loop.

    Args:
        work: answers a batch, in its order; called in the executor, one batch at a time.
        executor: of one thread.
        most: questions in a batch.
        wait_s: how long an idle worker waits for further questions.
    """

    def __init__(
        self,
        work: Callable[[list[Question]], list[Answer]],
        executor: Executor,
        *,
        most: int,
        wait_s: float = 0.0,
    ) -> None:
        self._work, self._executor, self._most, self._wait = work, executor, most, wait_s
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def ask(self, question: Question) -> Answer:
        """The answer. A question whose asker has gone before its batch began is not worked on."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._answer_all())
        return await future

    async def _answer_all(self) -> None:
        if self._wait and len(self._waiting) < self._most:
            await asyncio.sleep(self._wait)
        loop = asyncio.get_running_loop()
        while batch := self._next():
            questions = [question for question, _ in batch]
            try:
                answers = await loop.run_in_executor(self._executor, self._work, questions)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _next(self) -> list[tuple[Question, "asyncio.Future[Answer]"]]:
        batch: list[tuple[Question, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._most:
            question, future = self._waiting.popleft()
            if not future.done():
                batch.append((question, future))
        return batch
