"""The files in launch/: what can be checked of them without a cluster.

tests/functional/launch.sh runs a sweep, and the command of the JobSet.
"""

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobset_check import problems

from distill.config import default_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
# Beside the interpreter, which may not be on PATH.
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def job_spec(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def failure_rule(jobset):
    return jobset["spec"]["failurePolicy"]["rules"][0]


def exit_codes(jobset):
    return job_spec(jobset)["podFailurePolicy"]["rules"][1]["onExitCodes"]


def container(jobset):
    return job_spec(jobset)["template"]["spec"]["containers"][0]


def test_jobset_is_valid():
    assert list(problems(JOBSET)) == []


@pytest.mark.parametrize(
    ("named", "spoil"),
    [
        ("RestartAll", lambda j: failure_rule(j).update(action="RestartAll")),
        ("replica", lambda j: j["spec"]["replicatedJobs"][0].update(replica=2)),
        ("kind", lambda j: j.pop("kind")),
        ("Math_CL", lambda j: j["metadata"].update(name="Math_CL")),
        ("parallelizm", lambda j: job_spec(j).update(parallelizm=16)),
        ("16", lambda j: job_spec(j).update(completions="16")),
        ("imagee", lambda j: container(j).update(imagee="x")),
        ("operator", lambda j: exit_codes(j).pop("operator")),
        ("mountPath", lambda j: container(j)["volumeMounts"][0].pop("mountPath")),
    ],
)
def test_a_spoilt_jobset_is_refused(named, spoil):
    jobset = copy.deepcopy(JOBSET)
    spoil(jobset)
    [problem] = problems(jobset)
    assert named in problem


def test_jobset_agrees_with_itself():
    spec, pod = job_spec(JOBSET), job_spec(JOBSET)["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    per_host = container(JOBSET)["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == chips // per_host
    assert f"train_micro_batch_size={chips}" in " ".join(container(JOBSET)["args"])
    assert exit_codes(JOBSET)["containerName"] == container(JOBSET)["name"]
    statuses = set(re.findall(r"exit (\d+)", container(JOBSET)["args"][0]))
    assert statuses == set(map(str, exit_codes(JOBSET)["values"]))


def test_script_of_the_jobset():
    if not SHELLCHECK.exists():
        pytest.skip("no shellcheck beside the interpreter")
    script = "#!/bin/bash\n" + container(JOBSET)["args"][0]
    result = subprocess.run([SHELLCHECK, "-"], input=script, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launchers_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 100
    assert any(line.startswith(("#     ", "    ")) for line in lines[:8]), "no command at the top"


def test_keys_shown_exist():
    for path in LAUNCH.iterdir():
        for key in re.findall(r"--(?:config\.|sweep=)([a-z][\w.]+)=", path.read_text()):
            section = default_config()
            for name in key.split("."):
                assert name in section, (path.name, key)
                section = section[name]


def test_slurm_script_wants_config_and_workdir():
    bash = shutil.which("bash")
    result = subprocess.run([bash, LAUNCH / "slurm.sbatch"], text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: usage: sbatch")
