"""Every overlay of cluster/kuberay, rendered: what the API server and the operator refuse, and what our CLI would."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ray_prefopt.cli import COMMANDS
from ray_prefopt.config import TrainConfig
from ray_prefopt.settings import load_config, load_tune_config, split_flags
from tests.kuberay import CRDS, rule_problems, schema_problems
from tests.kustomize import Manifest, patch, render

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
RAY_KINDS = {
    "RayCluster": ("interactive", "gcs-fault-tolerance"),
    "RayJob": ("cpu-smoke", "gpu", "gpu-spot", "kueue", "s3", "tune"),
    "RayCronJob": ("nightly-evaluation",),
}
KUBERNETES = "1.32"
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no schemas of KubeRay in {CRDS}: set KUBERAY_CRD_DIR"
)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render(KUBERAY / "overlays" / name) for name in OVERLAYS}


def of_ray(objects: list[Manifest]) -> Manifest:
    """The one object of an overlay that is KubeRay's."""
    (item,) = (item for item in objects if item["kind"] in RAY_KINDS)
    return copy.deepcopy(item)


def cluster_of(item: Manifest) -> dict[str, Any]:
    spec = item["spec"]
    spec = spec.get("jobTemplate", spec)
    return dict(spec.get("rayClusterSpec", spec))


def groups(item: Manifest) -> list[dict[str, Any]]:
    """The head's group, then those of the workers."""
    cluster = cluster_of(item)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(objects: list[Manifest]) -> Iterator[dict[str, Any]]:
    yield from (group["template"]["spec"] for group in groups(of_ray(objects)))
    yield from (item["spec"]["template"]["spec"] for item in objects if item["kind"] == "StatefulSet")


def quantity(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


# --- Kubernetes and the operator ---


def test_every_overlay_is_here() -> None:
    assert sorted(name for names in RAY_KINDS.values() for name in names) == OVERLAYS


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="compares with kubectl kustomize: no kubectl here"
)
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_renders_the_same(rendered: dict[str, list[Manifest]], name: str) -> None:
    out = subprocess.check_output(["kubectl", "kustomize", KUBERAY / "overlays" / name], text=True)

    def by_name(objects: list[Manifest]) -> dict[Any, Manifest]:
        return {(item["kind"], item["metadata"]["name"]): item for item in objects}

    assert by_name(rendered[name]) == by_name(list(yaml.safe_load_all(out)))


def test_each_has_a_config_of_its_own(rendered: dict[str, list[Manifest]]) -> None:
    """A job that is tried anew reads its own, whatever else was applied; it is mounted by every pod of it."""
    owners: dict[str, set[str]] = {}
    for objects in rendered.values():
        (config,) = (item["metadata"]["name"] for item in objects if item["kind"] == "ConfigMap")
        owners.setdefault(config, set()).add(of_ray(objects)["metadata"]["name"])
        for group in groups(of_ray(objects)):
            volumes = group["template"]["spec"]["volumes"]
            mounted = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
            assert mounted == [config]
    assert all(len(jobs) == 1 for jobs in owners.values())
    assert len(set.union(*owners.values())) == len(owners)


@needs_crds
@pytest.mark.parametrize("name", OVERLAYS)
def test_schemas_of_kuberay(rendered: dict[str, list[Manifest]], name: str) -> None:
    assert schema_problems(of_ray(rendered[name])) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_rules_of_the_operator(rendered: dict[str, list[Manifest]], name: str) -> None:
    assert rule_problems(of_ray(rendered[name])) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_core_objects(rendered: dict[str, list[Manifest]], name: str) -> None:
    core = [item for item in rendered[name] if item["kind"] not in RAY_KINDS]
    assert {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget"} <= {item["kind"] for item in core}
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    for spec in pods(rendered[name]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@needs_crds
@pytest.mark.parametrize(
    ("name", "path", "value", "problem"),
    [
        ("gpu", "/spec/entrypiont", "x", "'entrypiont' was unexpected"),
        ("gpu", "/spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
        ("gpu", "/spec/rayClusterSpec/workerGroupSpecs/0/minReplica", 1, "'minReplica' was unexpected"),
        (
            "gpu",
            "/spec/rayClusterSpec/authOptions/mode",
            "tokens",
            "'tokens' is not one of ['disabled', 'token']",
        ),
        ("gpu", "/spec/rayClusterSpec/headGroupSpec/template/spec/volums", [], "'volums' was unexpected"),
        ("gpu", "/spec/deletionStrategy/deletionRules/0/policy", "Delete", "'Delete' is not one of"),
        ("gpu-spot", "/spec/rayClusterSpec/autoscalerOptions/verison", "v2", "'verison' was unexpected"),
        ("interactive", "/spec/rayVersoin", RAY, "'rayVersoin' was unexpected"),
        (
            "interactive",
            "/spec/workerGroupSpecs/0/template/spec/containers/0/imge",
            "x",
            "'imge' was unexpected",
        ),
        (
            "interactive",
            "/spec/headGroupSpec/template/spec/containers/0/resources/limits/cpu",
            "4 CPUs",
            "valid",
        ),
        (
            "gcs-fault-tolerance",
            "/spec/gcsFaultToleranceOptions/redisAdress",
            "x",
            "'redisAdress' was unexpected",
        ),
        ("nightly-evaluation", "/spec/schedul", "0 3 * * *", "'schedul' was unexpected"),
        ("nightly-evaluation", "/spec/jobTemplate/rayClusterSpec/head", {}, "'head' was unexpected"),
    ],
)
def test_a_wrong_key_or_value_is_caught(
    rendered: dict[str, list[Manifest]], name: str, path: str, value: Any, problem: str
) -> None:
    item = of_ray(rendered[name])
    patch(item, [{"op": "add", "path": path, "value": value}])
    (found,) = schema_problems(item)
    assert problem in found


@pytest.mark.parametrize(
    "kind", ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"]
)
def test_a_wrong_key_of_a_core_object_is_caught(rendered: dict[str, list[Manifest]], kind: str) -> None:
    item = copy.deepcopy(next(item for item in rendered["gcs-fault-tolerance"] if item["kind"] == kind))
    item.get("spec", item)["wrong"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="'wrong' was unexpected"):
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


HEAD = "/spec/rayClusterSpec/headGroupSpec"
WORKERS = "/spec/rayClusterSpec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("gpu", {"/metadata/name": "Train"}, "name Train is no DNS-1035 label"),
        ("gpu", {"/metadata/name": "t" * 48}, "is longer than 47"),
        ("gpu", {"/spec/suspend": True}, "suspend needs shutdownAfterJobFinishes"),
        (
            "gpu",
            {"/spec/ttlSecondsAfterFinished": 9},
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
        ),
        (
            "gpu",
            {"/spec/shutdownAfterJobFinishes": True},
            "deletionRules and shutdownAfterJobFinishes exclude",
        ),
        ("gpu", {"/spec/deletionStrategy": {}}, "deletionStrategy has no rules"),
        (
            "gpu",
            {"/spec/clusterSelector": {"ray.io/cluster": "x"}},
            "needs one of rayClusterSpec and clusterSelector; backoffLimit needs a cluster of the job's own, and a "
            "mode that submits",
        ),
        ("kueue", {"/spec/clusterSelector": {"ray.io/cluster": "x"}}, "suspend and clusterSelector exclude"),
        ("gpu", {"/spec/submissionMode": "InteractiveMode"}, "backoffLimit needs a cluster"),
        (
            "gpu",
            {"/spec/submissionMode": "SidecarMode", "/spec/submitterConfig": {}},
            "SidecarMode and submitterConfig exclude each other",
        ),
        (
            "gpu",
            {"/spec/submissionMode": "SidecarMode", f"{HEAD}/template/spec/restartPolicy": "Always"},
            "SidecarMode needs restartPolicy Never for the head",
        ),
        (
            "gpu",
            {"/spec/deletionStrategy/deletionRules/0/condition/jobDeploymentStatus": "Failed"},
            "DeleteCluster needs one of jobStatus and jobDeploymentStatus",
        ),
        (
            "gpu",
            {"/spec/deletionStrategy/deletionRules/1/policy": "DeleteCluster"},
            "two rules of one policy for",
        ),
        (
            "gpu",
            {"/spec/deletionStrategy/deletionRules/1/condition/ttlSeconds": 86401},
            "workers go first, then the cluster, then the job",
        ),
        (
            "gpu",
            {"/spec/rayClusterSpec/enableInTreeAutoscaling": True},
            "DeleteWorkers is not for clusters with",
        ),
        (
            "gpu",
            {f"{HEAD}/resources": {"CPU": "1"}},
            "head: resources both in rayStartParams and as resources",
        ),
        ("gpu", {f"{WORKERS}/rayStartParams/labels": "a=b"}, "workers: labels belong into labels"),
        ("gpu", {f"{WORKERS}/labels": {"a": "not one"}}, "workers: 'not one' is no label"),
        ("gpu", {f"{WORKERS}/replicas": 3}, "workers: replicas are not within minReplicas and maxReplicas"),
        ("gpu", {"/spec/rayClusterSpec/rayVersion": "2.9.0"}, "tokens need rayVersion 2.52.0; got 2.9.0"),
        (
            "gpu",
            {"/spec/rayClusterSpec/autoscalerOptions": {}},
            "autoscalerOptions without enableInTreeAutoscaling",
        ),
        (
            "gpu-spot",
            {f"{WORKERS}/template/spec/restartPolicy": "Always"},
            "workers: autoscaler v2 needs restartPolicy Never",
        ),
        (
            "gpu-spot",
            {f"{HEAD}/template/spec/containers/0/env/0": {"name": "RAY_enable_autoscaler_v2", "value": "1"}},
            "autoscalerOptions.version chooses the autoscaler",
        ),
        (
            "gcs-fault-tolerance",
            {"/spec/headGroupSpec/rayStartParams/redis-password": "x"},
            "gcsFaultToleranceOptions say where Redis is, not ['redis-password']",
        ),
        ("nightly-evaluation", {"/spec/schedule": "@never"}, "schedule '@never' is not five fields"),
    ],
)
def test_what_the_operator_would_refuse_is_caught(
    rendered: dict[str, list[Manifest]], name: str, changes: dict[str, Any], problem: str
) -> None:
    item = of_ray(rendered[name])
    patch(item, [{"op": "add", "path": path, "value": value} for path, value in changes.items()])
    assert problem in "; ".join(rule_problems(item))


# --- What all of them have in common ---


def test_the_bases_describe_one_cluster() -> None:
    """But for the name of its config."""
    bases = {"train": "config", "interactive": "interactive", "evaluation": "evaluation"}
    clusters = [
        json.dumps(cluster_of(of_ray(render(KUBERAY / "base" / name)))).replace(
            f"ray-prefopt-{config}", "config"
        )
        for name, config in bases.items()
    ]
    assert clusters[0] == clusters[1] == clusters[2]


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_is_the_pinned_one_and_asks_for_a_token(rendered: dict[str, list[Manifest]], name: str) -> None:
    item = of_ray(rendered[name])
    cluster = cluster_of(item)
    assert (cluster["rayVersion"], cluster["authOptions"]) == (RAY, {"mode": "token"})
    for group in groups(item):
        needs_gpu = (
            "nvidia.com/gpu" in groups(item)[1]["template"]["spec"]["containers"][0]["resources"]["limits"]
        )
        tag = f"{RAY}-{'gpu' if needs_gpu else 'cpu'}"
        assert [container["image"] for container in group["template"]["spec"]["containers"]] == [
            f"registry.example.com/ray-prefopt:{tag}"
        ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods(rendered: dict[str, list[Manifest]], name: str) -> None:
    """Guaranteed resources, no root, room for the object store, and volumes that exist."""
    claims = {item["metadata"]["name"] for item in rendered[name] if item["kind"] == "PersistentVolumeClaim"}
    configs = {item["metadata"]["name"] for item in rendered[name] if item["kind"] == "ConfigMap"}
    for pod in pods(rendered[name]):
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        if container["name"] == "redis":
            continue
        assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
        assert volumes["config"]["configMap"]["name"] in configs
        runs = volumes["runs"]
        assert (
            runs["persistentVolumeClaim"]["claimName"] in claims if name != "s3" else runs["emptyDir"] == {}
        )
        memory = quantity(container["resources"]["limits"]["memory"])
        assert 0.3 * memory <= quantity(volumes["shm"]["emptyDir"]["sizeLimit"]) <= 0.35 * memory


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_find_their_pods(rendered: dict[str, list[Manifest]], name: str) -> None:
    labels = [group["template"]["metadata"]["labels"] for group in groups(of_ray(rendered[name]))]
    labels = [{**own, "ray.io/node-type": node} for own, node in zip(labels, ("head", "worker"), strict=True)]
    labels += [
        item["spec"]["template"]["metadata"]["labels"]
        for item in rendered[name]
        if item["kind"] == "StatefulSet"
    ]

    def selected(spec: dict[str, Any]) -> list[int]:
        selector = spec.get("podSelector", spec.get("selector"))
        selector = selector.get("matchLabels", selector)
        return [index for index, own in enumerate(labels) if selector.items() <= own.items()]

    kinds = ("NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet")
    found = {
        (item["kind"], item["metadata"]["name"]): selected(item["spec"])
        for item in rendered[name]
        if item["kind"] in kinds
    }
    of_redis = {(kind, "ray-prefopt-redis"): [2] for kind in ("NetworkPolicy", "Service", "StatefulSet")}
    assert found == {
        ("NetworkPolicy", "ray-prefopt"): [0, 1],
        ("PodDisruptionBudget", "ray-prefopt-head"): [0],
        **(of_redis if name == "gcs-fault-tolerance" else {}),
    }


def test_secrets_are_named_and_never_there(rendered: dict[str, list[Manifest]]) -> None:
    text = yaml.safe_dump(rendered)
    assert not any(item["kind"] == "Secret" for objects in rendered.values() for item in objects)
    named = set(re.findall(r"secretKeyRef:\s+key: \w+\s+name: ([\w-]+)", text))
    named |= set(re.findall(r"secretRef:\s+name: ([\w-]+)", text))
    assert named == {"ray-prefopt-tokens", "ray-prefopt-redis", "ray-prefopt-s3"}
    page = (ROOT / "cluster" / "README.md").read_text()
    assert all(f"kubectl create secret generic {name}" in page for name in named)


# --- The commands ---


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_cluster_has_room_for_the_run(
    rendered: dict[str, list[Manifest]], name: str, tmp_path: Path
) -> None:
    """The command parses, its config loads, the run has a name to be resumed by, and begins on the smallest cluster."""
    item = of_ray(rendered[name])
    command, config = parsed(rendered[name], tmp_path)
    run = config.run
    assert command == {"tune": "tune", "nightly-evaluation": "evaluate"}.get(name, "train")
    assert run.name is not None or command == "evaluate"
    assert run.storage_path == ("s3://ray-prefopt/runs" if name == "s3" else "/runs")
    _, workers = groups(item)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    assert run.use_gpu == (gpus > 0)
    per_node = min(int(limits["cpu"]) // run.cpus_per_worker, gpus if gpus else 10**9)
    assert run.min_workers <= workers["minReplicas"] * per_node
    assert run.max_workers <= workers["maxReplicas"] * per_node
    if run.max_failures == -1:
        assert cluster_of(item)["enableInTreeAutoscaling"]


def parsed(objects: list[Manifest], folder: Path) -> tuple[str, TrainConfig]:
    """The command of an overlay's entrypoint, and its config from the rendered ConfigMap."""
    (files,) = (item["data"] for item in objects if item["kind"] == "ConfigMap")
    for file, text in files.items():
        (folder / file).write_text(text)
    spec = of_ray(objects)["spec"]
    entrypoint = spec.get("jobTemplate", spec).get(
        "entrypoint", "ray-prefopt train -c /etc/ray-prefopt/run.yaml"
    )
    program, command, *given = shlex.split(entrypoint)
    assert program == "ray-prefopt"
    own, flags = split_flags(given)
    args = COMMANDS[command].parser(command).parse_args(own)
    paths = [folder / path.relative_to("/etc/ray-prefopt") for path in args.config]
    if command == "tune":
        assert args.resume  # a retry goes on with the search
        return command, load_tune_config(paths, flags)
    return command, load_config(paths, flags, base={"data": {"train": []}} if command == "evaluate" else None)


def test_runs_of_a_kind_differ_in_what_their_overlay_is_about(
    rendered: dict[str, list[Manifest]], tmp_path: Path
) -> None:
    _, gpu = parsed(rendered["gpu"], tmp_path)
    changes = {
        "gpu-spot": {"num_workers": (4, 8), "save_steps": 25, "max_failures": -1},
        "s3": {"storage_path": "s3://ray-prefopt/runs"},
        "interactive": {},
        "kueue": {},
    }
    for name, change in changes.items():
        _, config = parsed(rendered[name], tmp_path)
        assert config == gpu.model_copy(update={"run": gpu.run.model_copy(update=change)}), name


def test_the_smoke_run_is_the_quickstart(rendered: dict[str, list[Manifest]], tmp_path: Path) -> None:
    """On the examples that lie in the image."""
    _, smoke = parsed(rendered["cpu-smoke"], tmp_path)
    quickstart = load_config(
        [ROOT / "examples" / "quickstart.yaml"], ["--run.name", "smoke", "--run.storage_path=/runs"]
    )
    assert smoke.model_dump_json().replace("/opt/ray-prefopt/", "") == quickstart.model_dump_json()
