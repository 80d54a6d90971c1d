"""`python -m ray_retrieval.cli`, as the jobs of a cluster call it."""

from ray_retrieval.cli import main

main()
