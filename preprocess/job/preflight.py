"""Asking every node of the cluster what ``preprocess.preflight`` looks at."""

from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from preprocess.job import cluster
from preprocess.job.urls import written_url
from preprocess.preflight import Finding, PreflightConfig, differing, look

_TIMEOUT_SECONDS = 180.0
_GPU_SHARE = 0.01

_look = ray.remote(num_cpus=0, max_retries=0)(look)


def look_everywhere(config: PreflightConfig) -> dict[str, Sequence[Finding]]:
    """Returns what is found, by node.

    Raises:
        InputError: if no cluster answers.
    """
    config = replace(config, output=written_url("output", config.output))
    with cluster.joined_cluster(config.address):
        asked = {}
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            gpus = node["Resources"].get("GPU", 0.0)
            here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = _look.options(num_gpus=_GPU_SHARE if gpus else 0, scheduling_strategy=here)
            asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = task.remote(config, gpus)
        found: dict[str, Sequence[Finding]] = {name: _answer(reference) for name, reference in asked.items()}
    if others := differing(found):
        found["all nodes"] = others
    return found


def _answer(reference: ray.ObjectRef) -> Sequence[Finding]:
    try:
        answer: list[Finding] = ray.get(reference, timeout=_TIMEOUT_SECONDS)
    except GetTimeoutError:
        advice = "are its GPUs taken by others, or does the output or the hub not answer from there?"
        return [Finding(what="node", found=f"no answer within {_TIMEOUT_SECONDS:.0f} s", missing=advice)]
    except RayError as error:
        line = str(error).strip().splitlines()[-1]
        return [Finding(what="node", found="could not look", missing=line)]
    return answer
