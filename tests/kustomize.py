"""`kubectl kustomize` for what `cluster/` uses of it: resources, JSON patches, files as ConfigMaps, and images.

A key of a kustomization that is not one of these is an error, not something that is passed over.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KEYS = {"apiVersion", "kind", "resources", "patches", "configMapGenerator", "generatorOptions", "images"}


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization, those of its resources first."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    _only(spec, KEYS, folder)
    objects: list[Manifest] = []
    for name in spec.get("resources", []):
        path = folder / name
        objects += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    if "configMapGenerator" in spec:
        assert spec["generatorOptions"] == {"disableNameSuffixHash": True}, folder
    for generator in spec.get("configMapGenerator", []):
        _only(generator, {"name", "files", "behavior"}, folder)
        made = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": generator["name"]},
            "data": {name: (folder / name).read_text() for name in generator["files"]},
        }
        others = [item for item in objects if _key(item) != _key(made)]
        assert (len(others) < len(objects)) == (generator.get("behavior") == "replace"), folder
        objects = [*others, made]
    for change in spec.get("patches", []):
        _only(change, {"path", "target", "options"}, folder)
        _only(change["target"], {"kind"}, folder)
        operations = yaml.safe_load((folder / change["path"]).read_text())
        targets = [item for item in objects if item["kind"] == change["target"]["kind"]]
        assert targets, f"{folder}: nothing is a {change['target']['kind']}"
        for item in targets:
            name = item["metadata"]["name"]
            patch(item, operations)
            may_change = change.get("options") == {"allowNameChange": True}
            assert may_change or item["metadata"]["name"] == name, folder
    for image in spec.get("images", []):
        _only(image, {"name", "newName", "newTag"}, folder)
        _rename_images(objects, image)
    assert len({_key(item) for item in objects}) == len(objects), f"{folder}: two objects of one name"
    return objects


def patch(document: Any, operations: Sequence[Mapping[str, Any]]) -> None:
    """Change a document in place by the add, replace and remove of RFC 6902; KeyError where there is no such place.

    >>> document = {"a": [1, 3], "b/c": 1}
    >>> patch(document, [{"op": "add", "path": "/a/1", "value": 2}, {"op": "remove", "path": "/b~1c"}])
    >>> document
    {'a': [1, 2, 3]}
    """
    for operation in operations:
        *parents, last = [
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
        ]
        place = document
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        value = copy.deepcopy(operation.get("value"))
        if isinstance(place, list):
            index = len(place) if last == "-" else int(last)
            if operation["op"] == "add":
                place.insert(index, value)
                continue
            key: Any = index
        else:
            key = last
            if operation["op"] == "add":
                place[key] = value
                continue
        place[key]
        if operation["op"] == "remove":
            del place[key]
        elif operation["op"] == "replace":
            place[key] = value
        else:
            raise NotImplementedError(operation["op"])


def _rename_images(node: Any, image: Mapping[str, str]) -> None:
    """In all containers, wherever they are."""
    if isinstance(node, list):
        for item in node:
            _rename_images(item, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    repository, _, tag = container["image"].partition(":")
                    if repository == image["name"]:
                        tag = image.get("newTag", tag)
                        container["image"] = image.get("newName", repository) + (tag and f":{tag}")
            else:
                _rename_images(value, image)


def _key(item: Manifest) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]


def _only(given: Mapping[str, Any], known: set[str], folder: Path) -> None:
    assert given.keys() <= known, f"{folder}: {sorted(given.keys() - known)} is not rendered here"
