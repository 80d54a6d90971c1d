"""What can be set about a server."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ray_retrieval.config import Config, EngineName
from ray_retrieval.data.decode import MAX_BYTES, MAX_PIXELS
from ray_retrieval.errors import QueryError
from ray_retrieval.search.rerank import RerankConfigs

ANY_ORIGIN = "*"
NO_RERANKING = "none"
"""The name that searches give who want none."""
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#@*\sA-Z]+")
"""As browsers write one, to the letter."""
_HOST = re.compile(r"[^/?#@*\s]+")


class ServedIndex(Config):
    """An index to serve, with what made it."""

    index: str
    """The index directory."""
    model: str | None = None
    """The directory of the model that made it; unset: it is looked for beside the index."""


class ServeConfig(Config):
    """A server of one index or several, and of the models that made them.

    The processor shares are what Ray books for each replica when it places them. The defaults add up to
    0.75 for one index, so that a server fits on a laptop of two cores and leaves room for other work.
    """

    host: str = "127.0.0.1"
    """Address to listen on. The default answers this machine alone, `0.0.0.0` whoever can reach it."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""

    api_keys: str | None = None
    """File of the hashed keys that may ask, made by `ray-retrieval serve --new-key`. Unset: no key is needed,
    and the server answers this machine alone."""
    allow_anonymous: bool = False
    """Answer whoever can reach the server, without a key, on any address."""
    rate_limit: float | None = Field(None, gt=0)
    """Requests a second of one key, or of one address where there are no keys; of IPv6 the addresses of a
    network (/64) are one. Each search of a batch counts, a thumbnail counts a tenth. Unset: any number. Each
    gateway counts for itself."""
    rate_burst: int = Field(100, ge=1)
    """Requests that may come at once before `rate_limit` holds."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other web pages that may ask, such as `https://example.com`. `*` is any page, which takes
    `api_keys` or `allow_anonymous`: else whatever somebody looks at on this machine could ask."""
    url_hosts: tuple[str, ...] = ()
    """Hosts whose images may be named by URL, none unless told. A host at a private address is asked only
    where that address is listed too, with its port if it is neither 80 nor 443."""
    log_requests: bool = False
    """Write a line of JSON for each request to the log of the process that took it: its id, route, status,
    time and caller, and neither images nor keys."""
    url_timeout_s: float = Field(10.0, gt=0)
    """How long fetching one image by its URL may take, in seconds."""
    writable: bool = False
    """Whether images may be added and removed; where there are keys, it takes one of the scope `write`."""
    max_upload_bytes: int = Field(20 * 1024**2, ge=1, le=MAX_BYTES)
    """Largest image that may be sent, in bytes."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS)
    """Largest image that may be sent, in pixels; the default is the most that are decoded."""
    max_body_bytes: int = Field(64 * 1024**2, ge=1)
    """Largest request, with all its images, in bytes; those that it names by URL may be as large together."""
    max_k: int = Field(1000, ge=1)
    """Most hits that one search may ask for."""
    max_examples: int = Field(8, ge=1)
    """Most examples that one search may start from."""
    max_batch: int = Field(100, ge=1)
    """Most searches of one batch, and most images that are embedded in one request."""
    max_added: int = Field(100, ge=1)
    """Most images that are added in one request."""
    max_ongoing: int = Field(32, ge=1)
    """Searches that one gateway works on at once."""
    max_queued: int = Field(64, ge=0)
    """Searches that wait at one gateway for their turn; the next one is refused with status 503."""
    request_timeout_s: float = Field(30.0, gt=0)
    """How long a request may take, in seconds, before it is given up with status 503."""
    body_timeout_s: float = Field(20.0, gt=0)
    """How long a client may take to send a request's body, in seconds; then it is refused with status 408."""
    thumbnail_cache_bytes: int = Field(64 * 1024**2, ge=0)
    """Memory for thumbnails in each gateway, in bytes."""

    shard_groups: int = Field(0, ge=0)
    """Processes among which the shards of each index are divided; a few large groups are the fastest. With 0
    the gateways search themselves, which takes the least time where one process searches fast enough: groups
    pay for large indices, and on several machines."""
    shard_replicas: int = Field(1, ge=1)
    """Processes that search the same group of shards."""
    gateway_replicas: int = Field(1, ge=1)
    """Processes that take HTTP requests, merge hits, re-rank and make thumbnails."""
    encoder_replicas: int = Field(1, ge=1)
    """Processes that encode query images, for each model; the fewest, if `encoder_replicas_max` is set."""
    encoder_replicas_max: int | None = Field(None, ge=1)
    """Up to how many encoders Ray starts while requests wait; unset: always as many."""
    encoder_target_ongoing: float = Field(16.0, gt=0)
    """Images at one encoder, waiting ones included, above which Ray starts another."""
    encoder_batch: int = Field(16, ge=1)
    """Most images that are encoded together."""
    batch_wait_ms: float = Field(0.0, ge=0)
    """How long an idle encoder waits for further images before it begins, in milliseconds. With 0 a lone
    search does not wait, and images gather while the encoder works: the more load, the larger the batches."""
    encoder_threads: int = Field(1, ge=1)
    """Threads of an encoder."""
    shard_threads: int = Field(1, ge=1)
    """Threads of a shard group."""
    rerank_threads: int = Field(1, ge=1)
    """Threads of a gateway that re-rank and match."""
    gateway_cpus: float = Field(0.25, ge=0)
    """Cores that Ray books for a gateway."""
    encoder_cpus: float = Field(0.5, ge=0)
    """Cores that Ray books for an encoder."""
    encoder_gpus: float = Field(0.0, ge=0)
    """GPUs, or a share of one, that Ray books for an encoder; with 0 it encodes on the processor."""
    engine: EngineName = "torch"
    """What encodes: the model itself, or its export, which lies in the model's folder or beside it."""
    shard_cpus: float = Field(0.25, ge=0)
    """Cores that Ray books for a shard group."""
    surge_percent: int = Field(100, ge=0, le=100)
    """When another server is deployed in this one's place: how many of its processes Ray starts before it
    ends these, in percent of each kind. They book cores and memory beside these, and wait until there are
    enough; with 0 they take the places of these, and requests wait meanwhile. Encoders on GPUs always do."""
    check: Literal["size", "content"] = "size"
    """How groups of shards check files that they open: by size, or by checksum, which reads all."""

    rerank: dict[str, RerankConfigs] = Field(default_factory=dict)
    """Re-rankings that searches may ask for by name, such as `qe: [{name: query_expansion}]`. An index of
    local features has `geometric_verification` in any case."""
    default_rerank: str | None = None
    """The one that is used unless a search says otherwise. Unset, and for indices that it does not suit:
    geometric verification of local features, and none of codes and vectors."""
    partial: Literal["refuse", "allow"] = "refuse"
    """What is answered where a group of shards is dead or slow: status 503, or what the others have found,
    marked as partial. A search may ask for the other."""
    group_timeout_s: float = Field(10.0, gt=0)
    """How long a group of shards may take before an answer is given without it, in seconds; where it may not
    be left out, it is waited for as long as a request may take."""
    poll_s: float = Field(2.0, gt=0)
    """How often each gateway looks whether a new version of an index was published, in seconds."""
    start_timeout_s: float = Field(300.0, gt=0)
    """How long all processes together may take to start, in seconds."""

    @field_validator("cors_origins", "url_hosts", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A single one may be given as it is, as on the command line."""
        return (value,) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for one in origins:
            if one != ANY_ORIGIN and not _ORIGIN.fullmatch(one):
                raise ValueError(f"no browser sends '{one}' as an origin; one is such as https://example.com")
        return origins

    @field_validator("url_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for one in hosts:
            if not _HOST.fullmatch(one):
                raise ValueError(f"'{one}' is no host; one is such as images.example.com or 10.0.0.5:8080")
        return hosts

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if self.encoder_replicas_max is not None and self.encoder_replicas_max < self.encoder_replicas:
            raise ValueError("'encoder_replicas_max' is less than 'encoder_replicas'")
        if self.shard_replicas > 1 and not self.shard_groups:
            raise ValueError("'shard_replicas' is for groups of shards: set 'shard_groups' to 1 or more")
        if self.encoder_gpus and self.engine != "torch":
            raise ValueError(f"the engine {self.engine} runs on the processor: 'encoder_gpus' has to be 0")
        if NO_RERANKING in self.rerank:
            raise ValueError(f"'{NO_RERANKING}' is the name of no re-ranking")
        return self

    def check_writable(self) -> None:
        """See that indices may be changed here.

        Raises:
            QueryError: 403 if not.
        """
        if not self.writable:
            raise QueryError("this server changes no index", mend="start it with writable=true", status=403)

    def cpus(self, indexes: int = 1, models: int = 1) -> float:
        """Cores that Ray books for a server of so many indices and models."""
        return (
            self.gateway_replicas * self.gateway_cpus
            + models * self.encoder_replicas * self.encoder_cpus
            + indexes * self.shard_groups * self.shard_replicas * self.shard_cpus
        )

    def gpus(self, models: int = 1) -> float:
        """GPUs that Ray books for a server of so many models."""
        return models * self.encoder_replicas * self.encoder_gpus
