"""Checks a JobSet for Kubernetes without a cluster: python tests/jobset_check.py FILE

Its Jobs and Pods are checked against Kubernetes' own schema, without tolerance for unknown fields,
its other fields against the part of JobSet's API (jobset.x-k8s.io/v1alpha2) that is used here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    """The schema of an object that has no other fields."""
    return dict(type="object", properties=properties, required=required, additionalProperties=False)


SCHEMA = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        ["name"],
        name=NAME,
        annotations={"type": "object", "additionalProperties": {"type": "string"}},
    ),
    spec=_object(
        ["replicatedJobs"],
        network=_object([], enableDNSHostnames={"type": "boolean"}),
        successPolicy=_object(
            ["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=TEXTS
        ),
        failurePolicy=_object(
            [],
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": _object(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ACTIONS},
                    onJobFailureReasons=TEXTS,
                    targetReplicatedJobs=TEXTS,
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "template"],
                name=NAME,
                replicas={"type": "integer", "minimum": 1},
                template={"type": "object"},
            ),
        },
    ),
)


def problems(jobset: Any) -> Iterator[str]:
    """What is wrong with a JobSet, a line each."""
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset))
    yield from (f"{error.json_path}: {error.message}" for error in errors)
    for replicated in [] if errors else jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, **replicated["template"]}
        try:
            kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.path))
            yield f"Job {replicated['name']}, {where}: {error.message}"


def main(path: str) -> int:
    found = list(problems(yaml.safe_load(Path(path).read_text())))
    for problem in found:
        print(f"error: {path}: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
