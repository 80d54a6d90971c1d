"""Tests of artefacts write thousands of small files; none of them has to survive a power cut."""

import os

import pytest


@pytest.fixture(autouse=True, scope="package")
def no_waiting_for_disks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
