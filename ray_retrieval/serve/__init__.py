"""Serving: indices and their models over HTTP, on Ray Serve.

    http ──▶ backend ◀── gateway ──▶ searching ──▶ behind ◀── deployments, encoders, shards (Ray)
                            └──▶ rolling: which version is served

`app.run` starts it, `application.build` says what it consists of; `http` knows no Ray, and nor does the
gateway: it asks functions (`behind`), which other processes answer, or in tests this one.
"""
