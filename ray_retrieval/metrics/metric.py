"""A measured number and the rule by which it was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that carries its policy, because the field uses one name for several definitions.

    Attributes:
        name: short name, unique within a report, such as `map@5000`.
        value: the number, in 0…1.
        policy: one sentence: what is averaged over what, the cut-off, the divisor, the order of ties,
            and how a query without hits counts.
    """

    name: str
    value: float
    policy: str

    def __float__(self) -> float:
        return self.value
