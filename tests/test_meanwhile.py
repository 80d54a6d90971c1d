"""Loggers and environment variables are as before once a block is over, however it ends."""

import logging
import os
from contextlib import suppress

from ray_retrieval.cluster.meanwhile import environment, quiet


def test_loggers_have_their_levels_back():
    first, second = logging.getLogger("meanwhile.first"), logging.getLogger("meanwhile.second")
    first.setLevel(logging.DEBUG)
    with suppress(ValueError), quiet(first.name, second.name, below=logging.ERROR):
        assert not first.isEnabledFor(logging.WARNING)
        assert second.isEnabledFor(logging.ERROR)
        raise ValueError
    assert (first.level, second.level) == (logging.DEBUG, logging.NOTSET)


def test_variables_have_their_values_back(monkeypatch):
    monkeypatch.setenv("MEANWHILE_OLD", "old")
    monkeypatch.delenv("MEANWHILE_NEW", raising=False)
    with suppress(ValueError), environment({"MEANWHILE_OLD": "a", "MEANWHILE_NEW": "b"}):
        assert (os.environ["MEANWHILE_OLD"], os.environ["MEANWHILE_NEW"]) == ("a", "b")
        raise ValueError
    assert os.environ["MEANWHILE_OLD"] == "old"
    assert "MEANWHILE_NEW" not in os.environ
