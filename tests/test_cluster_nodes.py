"""What a driver and the nodes of a cluster have to have in common, without any."""

import shutil
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray.exceptions
from samples import coloured_table, write_images

from ray_retrieval import cluster, encode, train
from ray_retrieval.cluster.sharing import require_seen
from ray_retrieval.data.table import ImageTable, open_images
from ray_retrieval.errors import ClusterError, RecipeError
from ray_retrieval.lock import writing_alone
from ray_retrieval.storage import Folder


def test_a_node_that_does_not_see_the_folder_of_a_training_says_so_before_the_first_step(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(train.ray.train, "get_context", lambda: None)
    with pytest.raises(
        RecipeError, match=r"checkpoints: the node .* does not see in this folder .*s3://"
    ) as it:
        train._work({"run": str(tmp_path), "inputs": [None]})
    assert train.would_fail_alike(it.value), "so Ray Train does not try it again"


class TestEncoding:
    """An encoder on a node that lacks what the driver's has."""

    def jobs(self, tmp_path, table):
        return encode.EncodeJob(Folder(tmp_path / "model"), table, Folder(tmp_path / "out"))

    def refused(self, work):
        encoder = encode._PartEncoder([work], {}, encode.EncodeConfig(), 1)
        with pytest.raises(RecipeError, match="does not see in this folder") as found:
            encoder({"job": 0, "part": 0})
        return found.value.where

    def test_its_folder(self, tmp_path):
        job = self.jobs(tmp_path, coloured_table(2))
        with writing_alone(job.out, "encode"):
            to_see = encode._to_see(job)
            require_seen(to_see)
        assert self.refused(encode._Work("model", job.out.uri, to_see)) == job.out.path

    def test_its_images(self, tmp_path):
        write_images(tmp_path / "photos", 2)
        job = self.jobs(tmp_path, open_images(str(tmp_path / "photos")))
        to_see = encode._to_see(job)
        shutil.rmtree(tmp_path / "photos")
        assert self.refused(encode._Work("model", job.out.uri, to_see)).startswith(str(tmp_path / "photos"))

    @pytest.mark.parametrize(
        "image", [{"path": "s3://bucket/a.jpg"}, {"path": "/nowhere.jpg"}, {"bytes": b"a"}]
    )
    def test_what_is_not_here_or_in_a_store_is_not_looked_for(self, tmp_path, image):
        kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
        images = pa.array([{"bytes": None, "path": None, **image}], kind)
        table = ImageTable(pa.table({"id": ["a"], "image": images}), name="made")
        assert encode._to_see(self.jobs(tmp_path, table)) == ()

    def test_a_cluster_without_processors_has_to_grow_first(self, monkeypatch):
        nodes = [{"Alive": True, "Resources": {"memory": 1.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
        monkeypatch.setattr(encode, "ray", SimpleNamespace(nodes=lambda: nodes))
        with pytest.raises(ClusterError, match=r"no node of the cluster has a processor.*submit with `cpus`"):
            encode._pool(encode.EncodeConfig())


class TestJoining:
    """What is said where a cluster cannot be joined."""

    @pytest.fixture(autouse=True)
    def outside(self, monkeypatch):
        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)

    @pytest.mark.parametrize(
        "error", [ray.exceptions.AuthenticationError("none here"), ConnectionError("failed to connect")]
    )
    def test_without_its_token_or_with_another(self, monkeypatch, error):
        def refuse(**_):
            raise error

        monkeypatch.setattr(cluster.ray, "init", refuse)
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        said = r"RAY_ADDRESS=head:6379: .* token.*set RAY_AUTH_MODE=token"
        with pytest.raises(ClusterError, match=said), cluster.connect():
            pass

    @pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
    def test_by_an_address_that_takes_jobs(self, monkeypatch, address):
        monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("it was asked"))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"{address}: .* by HOST:PORT.*submit"), cluster.connect():
            pass
