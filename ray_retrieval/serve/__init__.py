"""Serving: one model and one index over HTTP, on Ray Serve.

`app.run` starts it, `app.build` makes the application; `http` is the HTTP layer and knows no Ray.
"""

from ray_retrieval.serve.config import ServeConfig

__all__ = ["ServeConfig"]
