"""Loggers and environment variables are as before once a block is over, however it ends."""

import logging
import os
from contextlib import suppress
from types import SimpleNamespace

import pytest

from ray_retrieval import cluster
from ray_retrieval.cluster.meanwhile import environment, quiet
from ray_retrieval.errors import ClusterError


def test_loggers_have_their_levels_back():
    first, second = logging.getLogger("meanwhile.first"), logging.getLogger("meanwhile.second")
    first.setLevel(logging.DEBUG)
    with suppress(ValueError), quiet(first.name, second.name, below=logging.ERROR):
        assert not first.isEnabledFor(logging.WARNING)
        assert second.isEnabledFor(logging.ERROR)
        raise ValueError
    assert (first.level, second.level) == (logging.DEBUG, logging.NOTSET)


def test_loggers_that_say_less_are_left_so():
    own, inherited = logging.getLogger("meanwhile.own"), logging.getLogger("meanwhile.own.inherited")
    own.setLevel(logging.CRITICAL)
    with quiet(own.name, inherited.name, below=logging.ERROR):
        assert not own.isEnabledFor(logging.ERROR)
        assert not inherited.isEnabledFor(logging.ERROR)


def test_variables_have_their_values_back(monkeypatch):
    monkeypatch.setenv("MEANWHILE_OLD", "old")
    monkeypatch.delenv("MEANWHILE_NEW", raising=False)
    with suppress(ValueError), environment({"MEANWHILE_OLD": "a", "MEANWHILE_NEW": "b"}):
        assert (os.environ["MEANWHILE_OLD"], os.environ["MEANWHILE_NEW"]) == ("a", "b")
        raise ValueError
    assert os.environ["MEANWHILE_OLD"] == "old"
    assert "MEANWHILE_NEW" not in os.environ


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("The current node timed out during startup. This could happen.\nlog"), "timed out during"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_ray_that_does_not_start_is_told_with_the_mend(monkeypatch, error, said):
    def init(**_):
        raise error

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(cluster, "ray", ray)
    for address, mend in (("", "RAY_ADDRESS=auto"), ("host:6379", "see that the cluster runs")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"did not start: .*{said}.*{mend}"), cluster.connect():
            pass


def test_what_is_set_for_a_local_ray_ends_with_it(monkeypatch):
    ray = SimpleNamespace(is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setattr(cluster, "ray", ray)
    monkeypatch.setattr(cluster, "_start", lambda address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in cluster.ALONE:
        monkeypatch.delenv(name)
    with cluster.connect():
        assert {name: os.environ[name] for name in cluster.ALONE} == cluster.ALONE
        assert cluster.is_alone()
        monkeypatch.setenv("RAY_ADDRESS", "another:6379")
        assert not cluster.is_alone()
        monkeypatch.delenv("RAY_ADDRESS")
    assert not set(cluster.ALONE) & set(os.environ)
    assert not cluster.is_alone()
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.setenv(name, "1")
    with cluster.connect():
        assert os.environ[name] == "1"
