"""The errors that a user can cause and mend.

    RetrievalError
    ├── RecipeError      a recipe or a command line says something impossible
    ├── DataError        images, labels, lists or splits are not what they should be
    │   └── StoreError   a store that holds images does not answer: nothing is said about the images
    ├── ModelError       weights or a model directory do not fit
    ├── ArtefactError    embeddings or an index are missing, damaged or made by another model
    │   └── ConflictError  somebody else writes to an index, or was faster: nothing is damaged
    ├── MetricError      a metric was asked for something undefined
    ├── QueryError       a query image or its parameters cannot be served
    └── ClusterError     Ray cannot give what was asked for

Each says what is wrong, where, and the mend. A parameter is called by its name in backticks, a recipe's key
by its dotted name. The command line prints it in one line, parameters as the options that set them, and exits
with 2; the server answers with its `status` and a JSON body. Anything else that escapes is a bug.
"""


class RetrievalError(Exception):
    """Something that the user can mend.

    Args:
        problem: what was expected and what was found, without a full stop.
        where: the file, row, key or address that it concerns.
        mend: what to do about it, as an imperative.
    """

    status = 400

    def __init__(self, problem: str, *, where: object = None, mend: str | None = None) -> None:
        self.problem = problem
        self.where = None if where is None else str(where)
        self.mend = mend
        super().__init__(problem)

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        tail = f" ({self.mend})" if self.mend else ""
        return f"{head}{self.problem}{tail}"

    def __reduce__(self) -> tuple[object, ...]:
        # Ray sends errors between processes; keyword-only arguments need a hand.
        return _rebuild, (type(self), self.problem, self.where, self.mend)


def _rebuild(kind: type[RetrievalError], problem: str, where: str | None, mend: str | None) -> RetrievalError:
    return kind(problem, where=where, mend=mend)


class RecipeError(RetrievalError):
    """A recipe or a command line says something unknown or impossible."""


class DataError(RetrievalError):
    """Images, labels, lists or splits are not what they should be."""


class StoreError(DataError):
    """A store that holds images does not answer; another attempt may succeed."""


class ModelError(RetrievalError):
    """Weights or a model directory do not fit."""


class ArtefactError(RetrievalError):
    """Embeddings or an index are missing, damaged or made by another model."""

    status = 409


class ConflictError(ArtefactError):
    """Somebody else is writing to a folder, or has overtaken this change; another attempt may succeed."""


class MetricError(RetrievalError):
    """A metric was asked for something that is not defined."""


class QueryError(RetrievalError):
    """A query cannot be answered as asked. `status` is the HTTP status that the server gives it."""

    def __init__(
        self, problem: str, *, where: object = None, mend: str | None = None, status: int = 400
    ) -> None:
        super().__init__(problem, where=where, mend=mend)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_query, (self.problem, self.where, self.mend, self.status)


def _rebuild_query(problem: str, where: str | None, mend: str | None, status: int) -> QueryError:
    return QueryError(problem, where=where, mend=mend, status=status)


class ClusterError(RetrievalError):
    """Ray cannot give what was asked for."""


def would_fail_alike(error: BaseException) -> bool:
    """Whether a training would fail of the same the next time; of anything else it may not."""
    return isinstance(error, RecipeError | DataError | MetricError) and not isinstance(error, StoreError)
