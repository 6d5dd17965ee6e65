"""What KubeRay's admission refuses: keys that its schemas lack, and what its controller checks beyond them."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.kustomize import Manifest

CRDS = Path(
    os.environ.get("KUBERAY_CRD_DIR", Path(__file__).resolve().parents[2] / "shared" / "kuberay-crds")
)
"""Of the operator's Helm chart: ray.io_rayclusters.yaml, ray.io_rayjobs.yaml, ray.io_raycronjobs.yaml."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DELETED_IN_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def schema_problems(item: Manifest) -> list[str]:
    """`place: problem` of a RayCluster, RayJob or RayCronJob, unknown keys among them."""
    errors = _validator(item["kind"]).iter_errors(item)
    return sorted(f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors)


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """The schema with Kubernetes' own words put into JSON Schema's, and no further keys in its objects.

    Of an object without properties, such as `metadata`, nothing is known.
    """
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        name: {key: _strict(item) for key, item in value.items()} if name == "properties" else _strict(value)
        for name, value in schema.items()
    }
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("anyOf", None)
        strict["type"] = ["integer", "string"]
        if "pattern" in strict:  # of quantities; a number is one, too
            strict["anyOf"] = [{"type": "integer"}, {"pattern": strict.pop("pattern")}]
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def rule_problems(item: Manifest) -> list[str]:
    """What the controller says of an object that its schema lets through (ray-operator's validation.go)."""
    name, spec = item["metadata"]["name"], item["spec"]
    longest = 63 if item["kind"] == "RayCluster" else 47
    found = [] if DNS_1035.fullmatch(name) else [f"name {name} is no DNS-1035 label"]
    found += [f"name {name} is longer than {longest}"] if len(name) > longest else []
    check = {"RayCluster": _of_cluster, "RayJob": _of_job, "RayCronJob": _of_cron_job}[item["kind"]]
    return [*found, *check(spec)]


def _of_cron_job(spec: Mapping[str, Any]) -> Iterator[str]:
    if len(spec["schedule"].split()) != 5:
        yield f"schedule {spec['schedule']!r} is not five fields"
    yield from _of_job(spec["jobTemplate"])


def _of_job(spec: Mapping[str, Any]) -> Iterator[str]:
    mode, cluster = spec.get("submissionMode", "K8sJobMode"), spec.get("rayClusterSpec")
    shuts_down, selector = spec.get("shutdownAfterJobFinishes", False), spec.get("clusterSelector")
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if (cluster is None) == (selector is None):
        yield "needs one of rayClusterSpec and clusterSelector"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend and clusterSelector exclude each other"
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules and shuts_down:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if "deletionStrategy" in spec and not rules:
        yield "deletionStrategy has no rules"
    yield from _of_deletion(rules, has_autoscaler=bool((cluster or {}).get("enableInTreeAutoscaling")))
    if spec.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield "backoffLimit needs a cluster of the job's own, and a mode that submits"
    if mode == "SidecarMode":
        banned = [
            key for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector") if key in spec
        ]
        yield from (f"SidecarMode and {key} exclude each other" for key in banned)
        if cluster and _restart_policy(cluster["headGroupSpec"]) != "Never":
            yield "SidecarMode needs restartPolicy Never for the head"
    yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    if cluster is not None:
        yield from _of_cluster(cluster)


def _of_deletion(rules: list[dict[str, Any]], *, has_autoscaler: bool) -> Iterator[str]:
    conditions = [
        tuple(rule["condition"].get(key) for key in ("jobStatus", "jobDeploymentStatus")) for rule in rules
    ]
    for rule, condition in zip(rules, conditions, strict=True):
        if condition.count(None) != 1:
            yield f"{rule['policy']} needs one of jobStatus and jobDeploymentStatus"
        if rule["policy"] == "DeleteWorkers" and has_autoscaler:
            yield "DeleteWorkers is not for clusters with an autoscaler"
    for condition in dict.fromkeys(conditions):
        own = [rule for rule, other in zip(rules, conditions, strict=True) if other == condition]
        if max(Counter(rule["policy"] for rule in own).values()) > 1:
            yield f"two rules of one policy for {condition}"
        after = {rule["policy"]: rule["condition"].get("ttlSeconds", 0) for rule in own}
        seconds = [after[policy] for policy in DELETED_IN_ORDER if policy in after]
        if seconds != sorted(seconds):
            yield f"for {condition}: workers go first, then the cluster, then the job"


def _of_cluster(spec: Mapping[str, Any]) -> Iterator[str]:
    workers = spec.get("workerGroupSpecs", [])
    has_autoscaler = spec.get("enableInTreeAutoscaling", False)
    head_env = {entry["name"] for entry in _container(spec["headGroupSpec"]).get("env", [])}
    for group in [spec["headGroupSpec"], *workers]:
        name, params = group.get("groupName", "head"), group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
            yield f"{name}: resources both in rayStartParams and as resources"
        if "labels" in params:
            yield f"{name}: labels belong into labels, not into rayStartParams"
        yield from (
            f"{name}: {value!r} is no label"
            for value in group.get("labels", {}).values()
            if not LABEL.fullmatch(value)
        )
        is_v2 = has_autoscaler and spec.get("autoscalerOptions", {}).get("version") == "v2"
        if is_v2 and _restart_policy(group) != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never"
    for group in workers:
        low, high = group["minReplicas"], group["maxReplicas"]
        if not low <= group.get("replicas", low) <= high:
            yield f"{group['groupName']}: replicas are not within minReplicas and maxReplicas"
    if "RAY_enable_autoscaler_v2" in head_env:
        yield "autoscalerOptions.version chooses the autoscaler, not RAY_enable_autoscaler_v2"
    if "autoscalerOptions" in spec and not has_autoscaler:
        yield "autoscalerOptions without enableInTreeAutoscaling"
    redis = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & head_env
    redis |= {"redis-password", "redis-username"} & spec["headGroupSpec"].get("rayStartParams", {}).keys()
    if redis:
        yield f"gcsFaultToleranceOptions say where Redis is, not {sorted(redis)}"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in spec.get("rayVersion", "0").split("."))
        if version < (2, 52, 0):
            yield f"tokens need rayVersion 2.52.0; got {spec.get('rayVersion')}"


def _container(group: Mapping[str, Any]) -> dict[str, Any]:
    return dict(group["template"]["spec"]["containers"][0])


def _restart_policy(group: Mapping[str, Any]) -> str:
    return str(group["template"]["spec"].get("restartPolicy", "Never"))
