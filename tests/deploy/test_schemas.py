"""Kubernetes, prometheus-operator and KEDA know every field of every object."""

import importlib
import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4
from tools.draw_rules import groups_of

from tests.deploy.rendering import ROOT

#: A recent one, and the oldest that manifests are for; between them fields have only been added.
VERSION, OLDEST = "1.37", "1.28"

#: What has every object and every field.
RICHEST = ("kustomize/multi-node", "kustomize/hpa", "kustomize/one-pod", "generated/2p2d, all options")

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"

#: API group → the module with its kinds.
OTHERS = {
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
}


def folder_of(version):
    """The strict schemas of a version."""
    (found,) = SCHEMAS.glob(f"v{version}.*-local-strict")
    return found


@cache
def registry(version):
    """The definitions that schemas refer to, read once."""

    def retrieve(uri):
        content = json.loads((folder_of(version) / uri.rpartition("/")[2]).read_text())
        return Resource.from_contents(content, default_specification=DRAFT4)

    return Registry(retrieve=retrieve)


@cache
def validator(version, kind, api_version):
    """The validator of one kind of object."""
    group, _, number = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], number)))
    schema = json.loads((folder_of(version) / f"{name}.json").read_text())
    return jsonschema.Draft4Validator(
        schema, registry=registry(version).with_resource("", DRAFT4.create_resource(schema))
    )


@cache
def complaints(version, text):
    """A schema's complaints about an object. Cached, because renderings share objects."""
    one = json.loads(text)
    found = validator(version, one["kind"], one["apiVersion"]).iter_errors(one)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def unknown_fields(model, given, place=""):
    """Fields of an object that its model does not have."""
    if isinstance(given, list):
        return [one for i, item in enumerate(given) for one in unknown_fields(model[i], item, f"{place}[{i}]")]
    fields = getattr(type(model), "model_fields", None)
    if not isinstance(given, dict) or fields is None:
        return []
    names = {field.alias or name: name for name, field in fields.items()}
    found = []
    for key, value in given.items():
        if key not in names:
            found.append(f"{place}.{key}")
        else:
            found += unknown_fields(getattr(model, names[key]), value, f"{place}.{key}")
    return found


def assert_known(rendering, version):
    """Check every field of each object that is Kubernetes' own."""
    for one in rendering.objects:
        if one["apiVersion"] not in OTHERS:
            found = complaints(version, json.dumps(one, sort_keys=True))
            assert found == [], f"{one['kind']} {one['metadata']['name']}"


def test_kubernetes_knows_every_field(rendering):
    """This holds for every way of deploying."""
    assert_known(rendering, VERSION)


@pytest.mark.parametrize("name", RICHEST)
def test_the_oldest_kubernetes_knows_every_field(renderings, name):
    """No object is newer than the chart's kubeVersion."""
    assert_known(renderings[name], OLDEST)


def test_others_know_every_field(rendering):
    """Monitors and scaled objects are checked by field name; their models check the values."""
    for one in rendering.objects:
        if one["apiVersion"] in OTHERS:
            kind = getattr(importlib.import_module(OTHERS[one["apiVersion"]]), one["kind"])
            assert unknown_fields(kind.model_validate(one), one) == [], f"{one['kind']} {one['metadata']['name']}"


@pytest.mark.parametrize("name", ["kustomize/multi-node", "helm/multi-node"])
def test_the_rules_of_prometheus_come_along(renderings, name):
    """The manifests contain all rules of deploy/prometheus."""
    rule = renderings[name].of_kind("PrometheusRule")["kvbelt"]
    assert rule["spec"]["groups"] == groups_of(ROOT / "deploy")


def test_a_field_that_does_not_exist_is_found(renderings):
    """A typing error in each kind of object is found."""
    objects = renderings["kustomize/multi-node"].objects
    (deployment,) = (one for one in objects if one["metadata"]["name"] == "vllm-decode" and one["kind"] == "Deployment")
    wrong = json.loads(json.dumps(deployment))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert "readynessProbe" in str(complaints(VERSION, json.dumps(wrong)))
    (scaled,) = (one for one in objects if one["metadata"]["name"] == "vllm-decode" and one["kind"] == "ScaledObject")
    wrong = json.loads(json.dumps(scaled))
    wrong["spec"]["minReplicas"] = 1
    kind = importlib.import_module(OTHERS[scaled["apiVersion"]]).ScaledObject
    assert unknown_fields(kind.model_validate(wrong), wrong) == [".spec.minReplicas"]
