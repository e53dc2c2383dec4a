"""deploy/kubernetes: the manifest fits the schema of KubeRay, and its parts fit each other."""

import copy
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import run_campaign
from tests.helpers import ROOT

MANIFEST = ROOT / "deploy" / "kubernetes" / "rayjob.yaml"
SCHEMA = ROOT / "tests" / "golden" / "rayjob_schema.yaml"
CRD = os.environ.get("KUBERAY_CRD")  # the file of a whole CRD, as `kubectl get crd rayjobs.ray.io -o yaml` prints it


def load(path: Path) -> list[Any]:
    return list(YAML(typ="safe").load_all(path.read_text(encoding="utf-8")))


CLAIM, JOB = load(MANIFEST)
CLUSTER = JOB["spec"]["rayClusterSpec"]
PODS = [group["template"]["spec"] for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])]


def close(schema: Any) -> None:
    """Lets a schema of Kubernetes refuse unknown fields, as `kubectl apply` does."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        close(value)


def problems(job: Any) -> list[str]:
    """What is wrong with a RayJob by the schema in this repository, or by that of KUBERAY_CRD."""
    (schema,) = load(SCHEMA)
    if CRD:
        versions = load(Path(CRD))[0]["spec"]["versions"]
        schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
        close(schema)
        schema["properties"]["metadata"] = {"type": "object"}  # described elsewhere
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(job)]


def test_the_manifest_is_a_rayjob() -> None:
    assert problems(JOB) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "python"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "yes"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs"), [{"groupName": "trials"}]),
    ],
)
def test_a_mistake_in_the_manifest_is_found(path: tuple[str, ...], value: object) -> None:
    job = copy.deepcopy(JOB)
    *parents, name = path
    place = job
    for parent in parents:
        place = place[parent]
    place[name] = value
    assert problems(job) != []


def test_the_entrypoint_runs_a_campaign_whose_results_are_on_the_volume_of_every_pod() -> None:
    python, script, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    options = run_campaign.run_parser().parse_args(arguments)
    assert (python, script) == ("python", run_campaign.__file__.rpartition("/")[2])
    assert (ROOT / options.campaign).is_file()
    assert options.address is None, "a campaign inside a Ray job joins its cluster"
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in PODS:
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        for container in pod["containers"]:
            (mount,) = container["volumeMounts"]
            assert mount["name"] == volume["name"]
            environment = {each["name"]: each["value"] for each in container["env"]}
            for path in (options.out, Path(environment["NGPT_CACHE"])):
                assert path.is_relative_to(mount["mountPath"])


def test_a_stopped_job_has_time_to_save() -> None:
    from tune.executors.ray_supervisor import SAVE_TIMEOUT

    environments = [{each["name"]: each["value"] for each in pod["containers"][0]["env"]} for pod in PODS]
    assert all(float(each["RAY_JOB_STOP_WAIT_TIME_S"]) > SAVE_TIMEOUT for each in environments)


def test_the_version_of_ray_is_one_that_this_project_allows() -> None:
    from importlib.metadata import requires

    (ray,) = (each for each in map(Requirement, requires("ngpt-campaign") or []) if each.name == "ray")
    assert CLUSTER["rayVersion"] in ray.specifier


def test_pods_run_an_image_that_the_dockerfile_builds_as_its_user() -> None:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    for pod in PODS:
        assert all(f"-t {container['image']} " in text for container in pod["containers"])
        assert pod["securityContext"]["runAsNonRoot"] and f"\nUSER {pod['securityContext']['runAsUser']}\n" in text
