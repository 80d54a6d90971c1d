"""What is refused before a training starts: settings, method and data that do not go together."""

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.optim import PlateauSchedule
from ray_retrieval.loop.validation import has_an_answer, refuse_unmeasured, rows_of_accuracy
from ray_retrieval.methods.base import Clock, Method


def refuse_misfits(method: Method, benchmark: Benchmark, config: TrainConfig) -> None:
    """Find what does not fit.

    Raises:
        RecipeError: if the method cannot be trained like that on such a benchmark.
        DataError: if nothing can be measured by its validation images.
    """
    if not method.config.training_image.square and not method.repeatable:
        raise RecipeError(
            f"{type(method).__name__} takes images of one size",
            where="method.image.resize",
            mend="set it to squash or short_side, or method.image.shapes to pad",
        )
    if config.accumulate > 1 and method.whole_batches and not method.repeatable:
        raise RecipeError(
            f"{type(method).__name__} pairs images across the whole batch",
            where="train.accumulate",
            mend="set it to 1",
        )
    refuse_unmeasured(config.validation.metric, method.config.form.kind)
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
