"""An index that is changed, killed and searched at random is at every step what a model of it says."""

from hypothesis import HealthCheck, Phase, settings
from soak_parts import IndexSoak

TestIndexSoak = IndexSoak.TestCase
TestIndexSoak.settings = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    # Looking for a shorter way to a failure would take minutes; these are short.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
