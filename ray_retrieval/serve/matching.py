"""Two photographs compared by their local features, with the drawing."""

import asyncio
import io
from concurrent.futures import Executor

from ray_retrieval import match_picture
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import QueryError
from ray_retrieval.match import Match, Photograph, compared
from ray_retrieval.search.verify import VerifyConfig
from ray_retrieval.serve.answers import MatchAnswer
from ray_retrieval.serve.backend import IdExample, PhotographExample
from ray_retrieval.serve.searching import Call, Searching, run_on
from ray_retrieval.serve.wire import ModelKey


class Matching:
    """Compares photographs by the local features of an index, or of a model beside it.

    Args:
        searching: encodes images and looks ids up.
        workers: threads that compare.
    """

    def __init__(self, searching: Searching, workers: Executor) -> None:
        self._searching, self._workers = searching, workers

    async def match(self, call: Call, first: PhotographExample, second: PhotographExample) -> MatchAnswer:
        """What they have in common.

        Raises:
            QueryError: if the index has no model of local features, or an image cannot be decoded.
        """
        found = await self._compared(call, first, second)
        points = [one.tolist() for one in found.locations()]
        return MatchAnswer(
            verdict=found.verdict,
            same_scene=found.same_scene,
            inliers=found.inliers,
            putatives=len(found.pairs),
            significance=found.significance,
            sizes=(found.first.size, found.second.size),
            features=(len(found.first.features.data), len(found.second.features.data)),
            points=(points[0], points[1]),
            matrix=None if found.geometry is None else found.geometry.matrix.tolist(),
            model=_model(call).fingerprint,
        )

    async def picture(self, call: Call, first: PhotographExample, second: PhotographExample) -> bytes:
        """The same drawn, as a PNG file."""
        found = await self._compared(call, first, second)

        def draw() -> bytes:
            file = io.BytesIO()
            match_picture.picture(found).save(file, "PNG")
            return file.getvalue()

        return await run_on(self._workers, draw)

    async def _compared(self, call: Call, first: PhotographExample, second: PhotographExample) -> Match:
        model = _model(call)
        a, b = await asyncio.gather(*(self._photograph(call, one, model) for one in (first, second)))
        config = call.live.rerankings.verification() or VerifyConfig()
        return await run_on(self._workers, lambda: compared(a, b, config))

    async def _photograph(self, call: Call, example: PhotographExample, model: ModelKey) -> Photograph:
        features = await self._searching.local_features(call, example, model)
        if isinstance(example, IdExample):
            return Photograph(example.id, (await self._searching.as_image(call, example)).data, features)
        return Photograph("the image", example.data, features)


def _model(call: Call) -> ModelKey:
    """The model of local features by which images are compared."""
    if call.live.index.form.kind is DescriptorKind.LOCAL:
        return call.live.model
    found = call.live.rerankings.local_model()
    if found is None:
        raise QueryError(
            f"photographs are compared by local features, index '{call.live.name}' holds "
            f"{call.live.index.form}",
            where="index",
            mend="name an index of local features",
            status=422,
        )
    return found
