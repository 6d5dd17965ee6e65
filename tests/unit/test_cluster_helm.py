"""The values for KubeRay's Helm chart describe the cluster of kuberay/base, by keys that the chart has."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kuberay import CRDS, rule_problems, schema_problems
from tests.kustomize import Manifest, render

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
KEYS = [
    line
    for line in Path(__file__).with_name("helm_ray_cluster_keys.txt").read_text().splitlines()
    if not line.startswith("#")
]
TOKEN = [
    {"name": "RAY_AUTH_MODE", "value": "token"},
    {
        "name": "RAY_AUTH_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "ray-prefopt-token", "key": "auth_token"}},
    },
]


def values(*files: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, yaml.safe_load((CLUSTER / "helm" / file).read_text()))
    return merged


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm does: maps key by key, lists as a whole."""
    merged = dict(under)
    for key, value in over.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def unknown(given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys that the chart does not read."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if name in KEYS or f"{name}.*" in KEYS:
            continue
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in KEYS):
            yield from unknown(value, f"{name}.")
        else:
            yield name


def made_by_chart(given: Mapping[str, Any]) -> Manifest:
    """The RayCluster that the chart's template makes of these values, its own labels left out."""
    head, worker = given["head"], given["worker"]

    def template(group: Mapping[str, Any], container: str) -> dict[str, Any]:
        made = {
            "name": container,
            "image": f"{given['image']['repository']}:{given['image']['tag']}",
            "env": given["common"]["containerEnv"] + group.get("containerEnv", []),
            **{key: group[key] for key in ("resources", "securityContext", "volumeMounts")},
        }
        spec = {
            "containers": [made],
            "securityContext": group["podSecurityContext"],
            "volumes": group["volumes"],
        }
        spec |= {"tolerations": group["tolerations"]} if group.get("tolerations") else {}
        return {"metadata": {"labels": group["labels"]}, "spec": spec}

    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": given["fullnameOverride"]},
        "spec": {
            "rayVersion": head["rayVersion"],
            "headGroupSpec": {
                "rayStartParams": head["rayStartParams"],
                "template": template(head, "ray-head"),
            },
            "workerGroupSpecs": [
                {
                    **{key: worker[key] for key in ("groupName", "replicas", "minReplicas", "maxReplicas")},
                    "rayStartParams": worker.get("rayStartParams", {}),
                    "template": template(worker, "ray-worker"),
                }
            ],
        },
    }


def as_chart_can(cluster: Manifest) -> Manifest:
    """A RayCluster of ours with what the chart has no key for said otherwise, or left out."""
    cluster = copy.deepcopy(cluster)
    spec = cluster["spec"]
    del cluster["metadata"]["labels"]
    assert spec.pop("authOptions") == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod.pop("automountServiceAccountToken", None)
        pod["containers"][0]["env"] = TOKEN + pod["containers"][0]["env"]
    return cluster


def small(cluster: Manifest) -> Manifest:
    """With what the overlay cpu-smoke changes in the same base, and the config of its own."""
    cluster = copy.deepcopy(cluster)
    job = next(
        item for item in render(CLUSTER / "kuberay" / "overlays" / "cpu-smoke") if item["kind"] == "RayJob"
    )
    given = job["spec"]["rayClusterSpec"]
    cluster["spec"] |= {key: given[key] for key in ("headGroupSpec", "workerGroupSpecs")}
    own: Manifest = json.loads(json.dumps(cluster).replace("ray-prefopt-config", "ray-prefopt-interactive"))
    return own


@pytest.fixture(scope="module")
def base() -> Manifest:
    objects = render(CLUSTER / "kuberay" / "base" / "interactive")
    return next(item for item in objects if item["kind"] == "RayCluster")


def test_the_values_make_the_cluster_of_the_base(base: Manifest) -> None:
    assert made_by_chart(values("values.yaml", "values-gpu.yaml")) == as_chart_can(base)


def test_the_small_ones_make_that_of_the_smoke_test(base: Manifest) -> None:
    assert made_by_chart(values("values.yaml")) == as_chart_can(small(base))


@pytest.mark.parametrize("file", ["values.yaml", "values-gpu.yaml"])
def test_keys_are_the_charts(file: str) -> None:
    assert list(unknown(values(file))) == []


def test_a_wrong_key_is_caught() -> None:
    given = merge(values("values.yaml"), {"authOptions": {"mode": "token"}, "head": {"rayversion": "2.60.0"}})
    assert list(unknown(given)) == ["head.rayversion", "authOptions"]


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"no schemas of KubeRay in {CRDS}: set KUBERAY_CRD_DIR")
@pytest.mark.parametrize("files", [("values.yaml",), ("values.yaml", "values-gpu.yaml")])
def test_what_the_chart_makes_is_accepted(files: tuple[str, ...]) -> None:
    cluster = made_by_chart(values(*files))
    assert schema_problems(cluster) + rule_problems(cluster) == []


def test_the_page_says_how_to_make_the_token() -> None:
    page = (CLUSTER / "README.md").read_text()
    assert "kubectl create secret generic ray-prefopt-token --from-literal=auth_token=" in page
