"""What can be set about a server."""

from typing import Literal

from pydantic import Field

from ray_retrieval.config import Config


class ServeConfig(Config):
    """A server of one model and one index.

    The processor shares are what Ray books for each replica when it places them. The defaults add up to
    1.0, so that a server fits on a laptop of two cores and leaves room for other work.
    """

    host: str = "127.0.0.1"
    """Address to listen on. The default answers this machine alone, `0.0.0.0` whoever can reach it."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    shard_groups: int = Field(1, ge=1)
    """Processes among which the index's shards are divided; a few large groups are the fastest."""
    gateway_replicas: int = Field(1, ge=1)
    """Processes that take HTTP requests, merge hits and make thumbnails."""
    encoder_replicas: int = Field(1, ge=1)
    """Processes that encode query images."""
    encoder_batch: int = Field(16, ge=1)
    """Most images that are encoded together."""
    batch_wait_ms: float = Field(5.0, ge=0)
    """How long an idle encoder waits for further images before it begins, in milliseconds. A lone search
    takes so much longer; many at once gain throughput. With 0, images still gather while it works."""
    encoder_threads: int = Field(1, ge=1)
    """Threads of an encoder."""
    shard_threads: int = Field(1, ge=1)
    """Threads of a shard group."""
    gateway_cpus: float = Field(0.25, ge=0)
    """Cores that Ray books for a gateway."""
    encoder_cpus: float = Field(0.5, ge=0)
    """Cores that Ray books for an encoder."""
    encoder_gpus: float = Field(0.0, ge=0)
    """GPUs, or a share of one, that Ray books for an encoder; with 0 it encodes on the processor."""
    shard_cpus: float = Field(0.25, ge=0)
    """Cores that Ray books for a shard group."""
    check: Literal["size", "content"] = "size"
    """How groups of shards check their files at the start: by size, or by checksum, which reads them all."""
    max_upload_bytes: int = Field(20 * 1024**2, ge=1)
    """Largest image that may be sent, in bytes."""
    max_body_bytes: int = Field(64 * 1024**2, ge=1)
    """Largest request, with all its images, in bytes."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Largest image that may be sent, in pixels."""
    max_k: int = Field(1000, ge=1)
    """Most hits that one search may ask for."""
    max_examples: int = Field(8, ge=1)
    """Most examples that one search may start from."""
    max_batch: int = Field(100, ge=1)
    """Most searches of one batch, and most images that are embedded in one request."""
    writable: bool = False
    """Whether images may be added and removed; where there are keys, it takes one of the scope `write`."""
    max_added: int = Field(100, ge=1)
    """Most images that are added in one request."""
    api_keys: str | None = None
    """File of the hashed keys that may ask, made by `ray-retrieval serve --new-key`. Unset: no key is needed,
    and the server answers this machine alone."""
    allow_anonymous: bool = False
    """Answer whoever can reach the server, without a key, on any address."""
    rate_limit: float | None = Field(None, gt=0)
    """Requests a second of one key, or of one address where there are no keys. Each search of a batch counts,
    a thumbnail counts a tenth. Unset: any number. Each gateway counts for itself."""
    rate_burst: int = Field(100, ge=1)
    """Requests that may come at once before `rate_limit` holds."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other web pages that may ask, such as `https://example.com`."""
    url_hosts: tuple[str, ...] = ()
    """Hosts whose images may be named by URL, none unless told. A host at a private address is asked only
    where that address is listed too."""
    log_requests: bool = False
    """Write a line of JSON for each request to the log of the process that took it: its id, route, status,
    time and caller, and neither images nor keys."""
    url_timeout_s: float = Field(10.0, gt=0)
    """How long fetching one image by its URL may take, in seconds."""
    max_ongoing: int = Field(32, ge=1)
    """Searches that one gateway works on at once."""
    max_queued: int = Field(64, ge=0)
    """Searches that wait at one gateway for their turn; the next one is refused with status 503."""
    request_timeout_s: float = Field(30.0, gt=0)
    """How long a search may take, in seconds, before it is given up with status 503."""
    start_timeout_s: float = Field(300.0, gt=0)
    """How long all processes together may take to start, in seconds."""
    thumbnail_cache_bytes: int = Field(64 * 1024**2, ge=0)
    """Memory for thumbnails in each gateway, in bytes."""

    @property
    def cpus(self) -> float:
        """Cores that Ray books for the whole server."""
        return (
            self.gateway_replicas * self.gateway_cpus
            + self.encoder_replicas * self.encoder_cpus
            + self.shard_groups * self.shard_cpus
        )

    @property
    def gpus(self) -> float:
        """GPUs that Ray books for the whole server."""
        return self.encoder_replicas * self.encoder_gpus
