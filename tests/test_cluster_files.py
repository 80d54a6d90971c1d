"""Files for clusters: launchers against Ray's own schema, manifests against a schema of KubeRay's fields.

That one, `kuberay_schema`, is ours: every field that the manifests may have, with its type, after the Go
types of KubeRay 1.6 (`ray-operator/apis/ray/v1`); the operator's own check may be stricter.
"""

import copy
import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from kuberay_schema import SCHEMAS
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from ray_retrieval import recipe as recipes
from ray_retrieval.cluster import AWAIT, Needs
from ray_retrieval.config import validate
from ray_retrieval.serve import app
from ray_retrieval.serve.application import SHORT_WAY, VARIABLES
from ray_retrieval.serve.config import ServeConfig, ServedIndex

ROOT = Path(__file__).parents[1]
LAUNCHERS = ["cluster.yaml", "cluster-onpremise.yaml"]
MANIFESTS = sorted((ROOT / "jobs" / "kuberay").glob("*.yaml"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
RAY = re.search(r"^ray==([0-9.]+)$", CONSTRAINTS, re.MULTILINE)[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def launcher(name):
    return yaml.safe_load((ROOT / name).read_text())


def manifest(kind):
    return next(m for m in (yaml.safe_load(path.read_text()) for path in MANIFESTS) if m["kind"] == kind)


def cluster_spec(found):
    spec = found["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def check_launcher(config):
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_fits_rays_schema(name):
    prepared = check_launcher(launcher(name))
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"idle_timeout_mins": 10}, jsonschema.ValidationError),
        ({"head_node_type": "haed"}, Exception),
        ({"docker": {"imagee": "x"}}, jsonschema.ValidationError),
    ],
)
def test_the_check_of_launchers_finds_what_is_wrong(wrong, error):
    with pytest.raises(error):
        check_launcher({**launcher("cluster.yaml"), **wrong})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_a_launcher_copies_and_calls_is_there(name):
    config = launcher(name)
    for there, here in config["file_mounts"].items():
        assert here.startswith("~") or (ROOT / here).exists(), here
        assert there.startswith(("/home/ray/", "~/"))
    commands = [text for key in ("setup_commands", "head_setup_commands") for text in config[key]]
    for command in (*commands, *config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        shlex.split(command)
    installs = " ".join(commands)
    assert "--constraint" in installs
    assert "ray_retrieval[tune,export]" in installs
    # What pip needs of the project is copied; links are copied as links, so what they lead to goes along.
    copied = {here: there for there, here in config["file_mounts"].items()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "ray_retrieval"} <= set(copied)
    for link in (path for path in (ROOT / "ray_retrieval").rglob("*") if path.is_symlink()):
        aim = link.resolve().relative_to(ROOT)
        assert copied[str(aim)] == str(Path(copied["ray_retrieval"]).parent / aim)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_asks_for_a_token_and_shows_its_dashboard_to_nobody_else(name):
    text = (ROOT / name).read_text()
    config = launcher(name)
    starts = [*config["head_start_ray_commands"], *config.get("docker", {}).get("run_options", [])]
    assert any("RAY_AUTH_MODE=token" in part for part in starts)
    assert any("--dashboard-host=127.0.0.1" in part for part in starts)
    assert any(there.endswith(".ray/auth_token") for there in config["file_mounts"])
    assert not re.search(r"AKIA[0-9A-Z]{16}|secret_access_key|RAY_AUTH_TOKEN=", text)


def test_the_launcher_of_a_cloud_scales_gpus_from_nothing_and_keeps_work_off_its_head():
    config = launcher("cluster.yaml")
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    for kind in workers.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"]
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]
    spot = types["gpu-spot"]
    assert spot["resources"]["GPU"] == 1
    assert spot["min_workers"] == 0
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for kind in types.values():
        assert kind["node_config"]["InstanceType"]
        assert kind["node_config"]["IamInstanceProfile"]["Arn"].endswith(":instance-profile/ray-retrieval")
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_launcher_of_given_hosts_uses_all_of_them():
    config = launcher("cluster-onpremise.yaml")
    node = next(iter(check_launcher(config)["available_node_types"].values()))
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])


def test_images_and_manifests_are_of_the_ray_that_is_pinned():
    assert re.search(r'"ray\[.*\]==(.*)\.\*"', PROJECT)[1] == RAY.rpartition(".")[0]
    named = re.findall(
        r"rayproject/ray:([^\s\"}]+)", "".join((ROOT / n).read_text() for n in ("cluster.yaml", "Dockerfile"))
    )
    assert len(named) >= 4
    assert {tag.rpartition("-")[0] for tag in named} == {f"{RAY}-py311"}
    assert {cluster_spec(yaml.safe_load(path.read_text()))["rayVersion"] for path in MANIFESTS} == {RAY}


def test_the_image_is_made_of_files_that_are_there_and_reach_the_build():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "ray_retrieval", "jobs"} == set(
        copied
    )
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert kept[0] == "*"
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_has_only_fields_of_kuberay(path):
    found = yaml.safe_load(path.read_text())
    jsonschema.validate(found, SCHEMAS[found["kind"]])
    spec = cluster_spec(found)
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_workers_fit_beside_what_kubernetes_keeps_of_a_node(kind):
    node = {"cpu": 8, "memory": 32}  # as cluster.yaml has them
    for group in cluster_spec(manifest(kind))["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert int(asked["cpu"]) < 0.95 * node["cpu"]
        assert int(asked["memory"].removesuffix("Gi")) < 0.87 * node["memory"]


def test_manifests_can_be_applied_beside_one_another():
    names = [yaml.safe_load(path.read_text())["metadata"]["name"] for path in MANIFESTS]
    assert len(set(names)) == len(names)  # KubeRay names the service of a cluster's head after it


def test_the_check_of_manifests_finds_a_wrong_field():
    wrong = manifest("RayJob")
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong, SCHEMAS["RayJob"])


def test_the_job_of_a_manifest_is_a_command_that_its_cluster_can_hold():
    spec = manifest("RayJob")["spec"]
    program, verb, file, *settings = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("ray-retrieval", "run")
    recipe = recipes.load(ROOT / "jobs" / Path(file).name, settings)
    assert file == f"/home/ray/ray_retrieval/jobs/{Path(file).name}"  # where the Dockerfile has it
    needs = Needs.read(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"][AWAIT])
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert needs.gpus == recipe.train.workers <= group["maxReplicas"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_service_of_a_manifest_is_one_that_serve_takes():
    spec = manifest("RayService")["spec"]
    given = yaml.safe_load(spec["serveConfigV2"])
    # Ray drops unknown keys without a word.
    known = ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True, mode="json")
    assert known == given
    (application,) = given["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert (module, getattr(app, builder)) == (app.__name__, app.from_args)
    rest = {key: value for key, value in application["args"].items() if key != "indexes"}
    config = validate(ServeConfig, rest)
    assert not config.allow_anonymous
    assert config.api_keys is not None
    cluster = spec["rayClusterConfig"]
    for group in (
        cluster["headGroupSpec"],
        *cluster["workerGroupSpecs"],
    ):  # whoever builds or serves reads it
        pod = group["template"]["spec"]
        (secret,) = [volume["name"] for volume in pod["volumes"] if "secret" in volume]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert str(Path(config.api_keys).parent) == mounts[secret]
    for index in application["args"]["indexes"].values():
        validate(ServedIndex, index)
    group = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.cpus() <= cores * group["minReplicas"]
    # A changed one starts beside it, on nodes that are there for as long.
    assert config.cpus() * (1 + config.surge_percent / 100) <= cores * group["maxReplicas"]
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"]
    assert max(config.gateway_cpus, config.encoder_cpus, config.shard_cpus) <= cores
    assert given["http_options"]["request_timeout_s"] > config.request_timeout_s
    assert given["controller_options"]["runtime_env"]["env_vars"] == VARIABLES | SHORT_WAY
