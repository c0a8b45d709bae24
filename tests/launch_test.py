"""The files in launch/: what can be checked of them without a cluster.

tests/functional/launch.sh runs a sweep, and the command of the JobSet.
"""

import ast
import copy
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jobset_check import problems

from distill.config import default_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
JOBSET, WITH_SERVERS = (
    yaml.safe_load((LAUNCH / f"gke_jobset{name}.yaml").read_text()) for name in ("", "_servers")
)
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


@pytest.mark.parametrize("jobset", [JOBSET, WITH_SERVERS])
def test_jobset_is_valid(jobset):
    assert list(problems(jobset)) == []


def test_jobset_with_servers_agrees_with_itself():
    trainer, sampler = (job["template"]["spec"] for job in WITH_SERVERS["spec"]["replicatedJobs"])
    [container] = trainer["template"]["spec"]["containers"]
    [urls] = [text for text in container["args"] if ".vllm.urls=" in text]
    name = WITH_SERVERS["metadata"]["name"]
    [server] = sampler["template"]["spec"]["containers"]
    assert "--port=8000" in server["args"]
    expected = [f"http://{name}-sampler-0-{i}.{name}:8000" for i in range(sampler["completions"])]
    assert ast.literal_eval(urls.partition("=")[2]) == tuple(expected)
    assert sampler["parallelism"] == sampler["completions"]
    [export] = sampler["template"]["spec"]["initContainers"]
    config = next(text for text in container["args"] if text.startswith("--config="))
    folder = next(text for text in server["args"] if text.startswith("--model=")).partition("=")[2]
    assert config in export["command"] and f"--output={folder}" in export["command"]
    assert WITH_SERVERS["spec"]["successPolicy"]["targetReplicatedJobs"] == ["trainer"]


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


def test_an_interruption_is_no_end_in_either_jobset():
    assert container(WITH_SERVERS)["args"][:2] == container(JOBSET)["args"][:2]
    assert job_spec(WITH_SERVERS)["podFailurePolicy"] == job_spec(JOBSET)["podFailurePolicy"]
    assert WITH_SERVERS["spec"]["failurePolicy"] == JOBSET["spec"]["failurePolicy"]


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


@pytest.mark.parametrize("name", ["slurm", "slurm_servers"])
def test_slurm_script_wants_config_and_workdir(name):
    bash = shutil.which("bash")
    result = subprocess.run([bash, LAUNCH / f"{name}.sbatch"], text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: usage: sbatch")


# In place of Slurm's: a step is noted, and the run's ends when it is told to, or at once.
SLURM = {
    "scontrol": 'if [ "$1" = show ]; then printf "n%s\\n" 0 1 2 3; else echo "$@" >> "$CALLS"; fi',
    "srun": """
case "$*" in
  *distill.main*) trap 'mkdir -p "$SAVED"; exit 0' TERM; sleep 0.2 ;;
esac
echo "$@" >> "$CALLS"
case "$*" in
  *distill.main*) for _ in $(seq "$TICKS"); do sleep 0.1; done ;;
  *api_server*) exec sleep 60 ;;
esac""",
}


def slurm_job(tmp_path, *flags, ticks=0, **variables):
    """A job of launch/slurm_servers.sbatch that was started, and the file of its calls."""
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    calls, workdir = tmp_path / "calls", tmp_path / "run"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SAVED": str(workdir / "saved"),
        "TICKS": str(ticks),
        "SLURM_JOB_NODELIST": "n[0-3]",
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "2",
        "VLLM_PYTHON": "vllm",
        **variables,
    }
    command = ["bash", LAUNCH / "slurm_servers.sbatch", "configs/qwen3.py", workdir, *flags]
    job = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return job, calls


def test_nodes_have_roles(tmp_path):
    variables = dict(SAMPLER_NODES="2", TEACHER_NODES="1", TEACHER_MODEL="/models/t")
    job, calls = slurm_job(tmp_path, "--config.seed=1", **variables)
    assert (job.wait(30), job.stderr.read()) == (0, "")
    steps = calls.read_text().splitlines()
    [export] = [line for line in steps if "distill.export_server" in line]
    [train] = [line for line in steps if "distill.main" in line]
    sample, teach = (
        next(line for line in steps if f"--model {model}" in line)
        for model in (f"{tmp_path}/run/serve", "/models/t")
    )
    assert steps.index(export) < steps.index(sample)
    nodes = [
        re.findall(r"--nodelist=(\S+) --nodes=(\d) --ntasks=(\d) --ntasks-per-node=(\d)", line)
        for line in (train, sample, teach)
    ]
    assert nodes == [[("n0", *"122")], [("n1,n2", *"242")], [("n3", *"111")]]
    urls = dict(re.findall(r"--config\.(\S+urls)=(\S+)", train))
    of_student = ast.literal_eval(urls["policy.generation.vllm.urls"])
    assert of_student == tuple(f"http://n{n}:{port}" for n in (1, 2) for port in (8000, 8001))
    assert ast.literal_eval(urls["teacher.vllm.urls"]) == ("http://n3:8000",)
    assert train.endswith("--config.seed=1") and export.endswith("--config.seed=1")
    assert steps[-1] == "requeue 7"  # the student is not there yet


def test_the_run_alone_is_told_to_save(tmp_path):
    job, calls = slurm_job(tmp_path, ticks=200)
    while "distill.main" not in (calls.read_text() if calls.exists() else ""):
        time.sleep(0.05)
    job.terminate()
    assert (job.wait(30), job.stderr.read()) == (0, "")
    assert (tmp_path / "run/saved").exists() and calls.read_text().endswith("requeue 7\n")


def test_too_few_nodes(tmp_path):
    job, _ = slurm_job(tmp_path, SAMPLER_NODES="4")
    assert job.wait(30) == 2 and "leave none to train" in job.stderr.read()
