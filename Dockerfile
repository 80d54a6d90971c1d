# The image of a cluster's nodes: Ray's own with this package and its recipes.
#
#   docker build --tag registry.example.com/ray-retrieval:0.1.0 .
#
# For nodes without GPUs: --build-arg BASE=rayproject/ray:2.60.0-py311-cpu
ARG BASE=rayproject/ray:2.60.0-py311-gpu
FROM ${BASE}

WORKDIR /home/ray/ray_retrieval
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users ray_retrieval ray_retrieval
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt '.[tune,export]'
ENV RAY_USAGE_STATS_ENABLED=0
