"""What is refused before a training starts: settings, method and data that do not go together."""

from collections.abc import Iterator
from typing import NamedTuple

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.optim import PlateauSchedule
from ray_retrieval.loop.validation import MEASURED, has_an_answer, rows_of_accuracy
from ray_retrieval.methods.base import Clock, Method, MethodConfig


class Misfit(NamedTuple):
    """A setting that does not go with the method: its key, what is wrong, and the mend."""

    where: str
    problem: str
    mend: str


def misfits(method: MethodConfig, kind: type[Method], config: TrainConfig) -> Iterator[Misfit]:
    """Settings of a training that do not go with a method, whatever it is trained on.

    Args:
        method: its settings.
        kind: its class.
        config: of the training.
    """
    name, makes = method.name, method.form.kind
    if config.validation.metric not in MEASURED[makes]:
        yield Misfit(
            "train.validation.metric",
            f"{config.validation.metric} is not measured of the {makes.value} that {name} makes",
            f"set it to {' or '.join(MEASURED[makes])}",
        )
    if not method.training_image.square and not kind.repeatable:
        yield Misfit(
            "method.image.resize",
            f"{name} takes images of one size",
            "set it to squash or short_side, or method.image.shapes to pad",
        )
    if config.accumulate > 1 and kind.whole_batches and not kind.repeatable:
        yield Misfit(
            "train.accumulate",
            f"the loss of {name} pairs images across the whole batch",
            "set it to 1",
        )


def refuse_misfits(method: Method, benchmark: Benchmark, config: TrainConfig) -> None:
    """Find what does not fit.

    Raises:
        RecipeError: if the method cannot be trained like that on such a benchmark.
        DataError: if nothing can be measured by its validation images.
    """
    for misfit in misfits(method.config, type(method), config):
        raise RecipeError(misfit.problem, where=misfit.where, mend=misfit.mend)
    if config.validation.metric == "accuracy" and not len(rows_of_accuracy(method, benchmark)):
        raise RecipeError(
            "accuracy is not measured: the validation queries are of other classes than are trained",
            where="train.validation.metric",
            mend="set it to map",
        )
    if isinstance(config.schedule, PlateauSchedule) and not len(benchmark.validation_queries):
        raise RecipeError(
            "the plateau schedule follows the validation, and there are no validation queries",
            where="train.schedule",
            mend="hold images out for validation in data, or choose another schedule",
        )
    validated = config.length[0] and method.config.form.kind is not DescriptorKind.CODES
    if validated and not has_an_answer(benchmark.validation_queries, benchmark.validation_database):
        raise DataError(
            "no validation query has another image of its class in the validation database, so there is "
            "nothing to measure",
            where=benchmark.name,
            mend="give validation images that share classes, or no validation queries",
        )


def planned_steps(
    method: Method, benchmark: Benchmark, config: TrainConfig, *, seed: int, workers: int
) -> int:
    """Optimiser steps of a training; 0 where nothing is trained, for which no batch need be made.

    Raises:
        RecipeError: if batches cannot be made, or the smallest has fewer images than there are workers.
        DataError: if batches cannot be made of such images.
    """
    if not config.length[0]:
        return 0
    sizes = method.plan_sizes(benchmark.train, config.batch_size, Clock(seed))
    if min(sizes) < workers:
        raise RecipeError(
            f"{min(sizes)} training images a step for {workers} workers",
            where="train.workers",
            mend=f"set it to {min(sizes)} or fewer",
        )
    return config.total_steps(len(sizes) * method.rounds)
