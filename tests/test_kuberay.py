"""The example for Kubernetes: it is whole, and its command is one that the program takes."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from preprocess.config import PreprocessConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((ROOT / "examples/kuberay.yaml").read_text())
    return made


def test_the_entry_point_is_a_command_of_this_program(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "preprocess"]
    config = tyro.cli(PreprocessConfig, args=words[3:])
    gpu_nodes = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert (config.device, config.workers) == ("cuda", gpu_nodes)
    assert config.resource_timeout > 600, "a node takes longer to come than jobs wait by default"


def test_every_pod_has_an_image_and_what_it_mounts(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert [group["rayStartParams"].get("num-gpus") for group in groups] == ["0", None, "0"]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            assert container["image"]
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
            if container["name"].startswith("ray-"):
                assert container["image"] == pod["containers"][0]["image"]
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_caches_of_a_node_lie_on_a_volume_that_outlives_its_pods(job: dict[str, Any]) -> None:
    pod = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = [volume for volume in pod["volumes"] if "hostPath" in volume]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    assert {"LATENTMILL_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} == {v["name"] for v in container["env"]}
    assert all(variable["value"].startswith(f"{mount['mountPath']}/") for variable in container["env"])
    assert f"--vae {mount['mountPath']}/" in job["spec"]["entrypoint"]
