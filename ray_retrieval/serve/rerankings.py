"""The re-rankings that searches may ask for by name: the very steps of `search.rerank`, over one version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import ArtefactError, QueryError, RetrievalError
from ray_retrieval.finder import local_index
from ray_retrieval.model_folder import model_of
from ray_retrieval.search import Index
from ray_retrieval.search.rerank import (
    AnyRerankConfig,
    GeometricVerification,
    GeometricVerificationConfig,
    Step,
    build_all,
)
from ray_retrieval.serve import answers
from ray_retrieval.serve.config import NO_RERANKING, ServeConfig
from ray_retrieval.serve.wire import ModelKey
from ray_retrieval.storage import Folder

VERIFICATION = "geometric_verification"


@dataclass(frozen=True)
class Reranking:
    """Steps under a name.

    Attributes:
        name: by which searches ask for them.
        steps: none where there is no re-ranking.
        refused: why this version cannot be re-ranked so; None: it can.
        local: the model of the local features that vectors are verified by; None: none.
    """

    name: str
    steps: tuple[Step, ...]
    refused: str | None = None
    local: ModelKey | None = None

    @property
    def depth(self) -> int:
        """How many hits of a search they need at least."""
        return max((step.depth for step in self.steps), default=1)

    @property
    def filters(self) -> bool:
        """Whether they go with a filter: others than verification look at the whole index."""
        return all(isinstance(step, GeometricVerification) for step in self.steps)


class Rerankings:
    """All re-rankings of a version of an index. Building them may take long for large indices.

    Args:
        config: what is configured.
        index: the version, all shards opened.
    """

    def __init__(self, config: ServeConfig, index: Index) -> None:
        found = {NO_RERANKING: Reranking(NO_RERANKING, ())}
        for name, steps in offered(config, index.form.kind).items():
            found[name] = _built(name, steps, index, config.rerank_threads)
        self._found = found
        self._configs = offered(config, index.form.kind)
        own = VERIFICATION if index.form.kind is DescriptorKind.LOCAL else NO_RERANKING
        # Of several indices it may suit others.
        self.default = config.default_rerank if config.default_rerank in found else own

    def choose(
        self, name: str | None, where: str | None, *, one_by_one: bool = True
    ) -> tuple[Reranking, list[str]]:
        """The re-ranking of a search, and what its answer has to say about it.

        Args:
            name: asked for; None: the default, which is left out where it cannot be used.
            where: the filter.
            one_by_one: whether its examples are images, of which each is searched for by itself.

        Raises:
            QueryError: if there is none of that name, or it cannot be used.
        """
        if name is not None and name not in self._found:
            known = ", ".join(self._found)
            raise QueryError(
                f"there is no re-ranking '{name}'", where="rerank", mend=f"known here: {known}", status=422
            )
        chosen = self._found[self.default if name is None else name]
        problem = chosen.refused
        if problem is None and where is not None and not chosen.filters:
            problem = "a filter does not go with it: it looks at the whole index"
        if problem is None and chosen.local is not None and not one_by_one:
            problem = "it compares images or ids one by one, several with combine=best"
        if problem is None:
            return chosen, []
        if name is None:
            return self._found[NO_RERANKING], [f"not re-ranked by {chosen.name}: {problem}"]
        raise QueryError(
            f"{name}: {problem}",
            where="rerank",
            mend=f"set rerank to {NO_RERANKING}",
            status=409 if chosen.refused else 422,
        )

    def described(self) -> list[answers.OfferedReranking]:
        """What there is, for clients."""
        return [
            answers.OfferedReranking(
                name=name, description=self._describe(name), is_default=name == self.default
            )
            for name in self._found
        ]

    def verification(self) -> GeometricVerificationConfig | None:
        """How two images of this index are compared; None without local features."""
        for steps in self._configs.values():
            for step in steps:
                if isinstance(step, GeometricVerificationConfig):
                    return step
        return None

    def local_model(self) -> ModelKey | None:
        """The model of local features beside an index of vectors, where a re-ranking has one."""
        return next(iter(self.local_models()), None)

    def local_models(self) -> list[ModelKey]:
        """The models of local features beside an index of vectors, each once."""
        return list(dict.fromkeys(one.local for one in self._found.values() if one.local is not None))

    def _describe(self, name: str) -> str:
        if name == NO_RERANKING:
            return "as the search finds them"
        said = ", then ".join(step.name.replace("_", " ") for step in self._configs[name])
        refused = self._found[name].refused
        return said if refused is None else f"{said}; not now: {refused}"


def offered(config: ServeConfig, kind: DescriptorKind) -> dict[str, tuple[AnyRerankConfig, ...]]:
    """The configured re-rankings that suit an index of some kind."""
    if kind is DescriptorKind.CODES:
        return {}
    own = {name: steps for name, steps in config.rerank.items() if steps and _suits(steps, kind)}
    if kind is DescriptorKind.LOCAL and VERIFICATION not in own:
        return {VERIFICATION: (GeometricVerificationConfig(),), **own}
    return own


def beside(config: ServeConfig, kind: DescriptorKind) -> list[str]:
    """The indices of local features by which an index of some kind is verified, each once."""
    named = (local_index(steps) for steps in offered(config, kind).values())
    return sorted({uri for uri in named if uri is not None})


def check_offered(config: ServeConfig, kinds: Mapping[str, DescriptorKind]) -> None:
    """Refuse re-rankings that suit none of the indices, by name.

    Raises:
        ArtefactError: naming the first one.
    """
    usable = {NO_RERANKING, *(name for kind in kinds.values() for name in offered(config, kind))}
    asked = [*config.rerank, *([config.default_rerank] if config.default_rerank else [])]
    for name in asked:
        if name not in usable:
            held = ", ".join(f"{index} holds {kind.value}" for index, kind in kinds.items())
            raise ArtefactError(
                f"re-ranking '{name}' suits none of the indices: {held}",
                where="rerank",
                mend="codes have none, local features geometric_verification alone",
            )


def _suits(steps: Sequence[AnyRerankConfig], kind: DescriptorKind) -> bool:
    own = [isinstance(step, GeometricVerificationConfig) and step.local is None for step in steps]
    return all(own) if kind is DescriptorKind.LOCAL else not any(own)


def _built(name: str, steps: Sequence[AnyRerankConfig], index: Index, threads: int) -> Reranking:
    try:
        built, model = tuple(build_all(steps, index, threads=threads)), None
        for step in built:
            # The fingerprint of the index that the step has opened: it may be replaced at any moment.
            if isinstance(step, GeometricVerification) and step.model and step.config.local:
                model = ModelKey(model_of(Folder(step.config.local)).uri, step.model)
        return Reranking(name, built, local=model)
    except RetrievalError as error:
        return Reranking(name, (), refused=error.problem)
