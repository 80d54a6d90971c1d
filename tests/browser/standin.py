"""Routes over a backend as the HTTP layer has them."""
import base64, io, json, time
from urllib.parse import unquote
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from ray_retrieval.errors import QueryError
from ray_retrieval.serve.backend import IdExample, ImageExample, SearchRequest
from ray_retrieval.serve.http import PAGE, _PAGE_POLICY
from ray_retrieval.serve.uploads import read_header


def create_app(backend, key=None):
    app = FastAPI()

    @app.middleware("http")
    async def headers(request, call_next):
        if key and request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {key}":
            answer = JSONResponse({"error": {"problem": "a key is needed", "where": "Authorization", "mend": "send one"}}, 401)
        else:
            answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = _PAGE_POLICY
        return answer

    @app.exception_handler(QueryError)
    async def problem(_, error):
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        return JSONResponse({"error": {"problem": error.problem, "where": error.where, "mend": error.mend}}, error.status, headers=headers)

    def image(data, box):
        h = read_header(data, max_pixels=10**7)
        return ImageExample(data, h.format, h.width, h.height, tuple(box) if box else None)

    def example(one):
        if "id" in one:
            return IdExample(one["id"], tuple(one["box"]) if one.get("box") else None)
        return image(base64.b64decode(one["image"]), one.get("box"))

    @app.post("/v1/search")
    async def search(request: Request):
        if request.headers["content-type"].startswith("multipart"):
            form = await request.form()
            rest = json.loads(form.get("request", "{}"))
            files = [await f.read() for f in form.getlist("image")]
            boxes = rest.pop("boxes", None) or [None] * len(files)
            if any(len(f) > 60_000 for f in files):
                raise QueryError("the upload is larger than 58.6 KiB", mend="send a smaller image", status=413)
            examples = [image(f, b) for f, b in zip(files, boxes)]
        else:
            rest = await request.json()
            examples = [example(e) for e in rest.pop("examples")]
        return await backend.search(SearchRequest(tuple(examples), **rest), deadline=time.monotonic() + 10)

    @app.post("/v1/match")
    async def match(request: Request):
        if request.headers["content-type"].startswith("multipart"):
            form = await request.form()
            rest = json.loads(form.get("request", "{}"))
            pair = [image(await form["first"].read(), None) if "first" in form else example(rest["first"]), image(await form["second"].read(), None) if "second" in form else example(rest["second"])]
        else:
            rest = await request.json()
            pair = [example(rest["first"]), example(rest["second"])]
        return await backend.match(*pair, rest.get("index"), deadline=0)

    @app.get("/v1/indexes")
    async def indexes():
        return backend.describe()

    @app.get("/v1/indexes/{name}/sample")
    async def sample(name: str, count: int = 12, seed: int | None = None, where: str | None = None):
        return await backend.sample(count, seed, where, name)

    @app.get("/v1/indexes/{name}/map")
    async def map_(name: str):
        return await backend.map(name)

    @app.get("/v1/indexes/{name}/{what}")
    async def images(request: Request, name: str, what: str, id: str):
        if what == "thumbnail":
            t = await backend.thumbnail(id, int(request.query_params.get("size", 256)), name)
            return Response(t.data, media_type=t.media_type)
        if what == "original":
            o = await backend.original(id, name)
            return Response(o.data, media_type=o.media_type)
        return await backend.record(id, name)

    @app.get("/healthz")
    async def healthz():
        return await backend.check()

    @app.get("/")
    async def page():
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app
