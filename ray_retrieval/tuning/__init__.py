"""Hyperparameter search but for Ray: the space, proposals, stopping, records of trials, the report."""
