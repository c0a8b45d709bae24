"""What users meet at the command line: --help, completion, the dry run, the page of all keys."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from distill.base import topology
from distill.base.errors import UserError
from distill.config import words as config_reference
from distill.config.completion import bash_script
from distill.config.parse import known_keys

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


# ---- help ----


def test_help_of_a_command_without_config_is_its_own():
    done = run("distill.report", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "--output" in done.stdout and "config" not in done.stdout


@pytest.mark.parametrize("command", ["main", "plan", "export"])
def test_help_is_short_and_shows_the_commands_own_flags_and_common_keys(command):
    done = run(f"distill.{command}", "--help")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 90 and f"python -m distill.{command} " in done.stdout
    assert "  --config" in lines and "  --config.distillation.lambda_=1.0" in lines
    assert "      optimizer updates (int: at least 1)" in lines
    own = {"main": "--workdir", "plan": "--topology", "export": "--checkpoint"}
    assert f"  {own[command]}" in lines
    assert "run_with_pdb" not in done.stdout, "absl's own"


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [["--help"], ["--config.nosuch=1"], []], ids=str)
def test_entry_points_speak_before_jax_is_imported(script, arguments):
    """The command's own help, or one line that says what is wrong."""
    module, _, function = SCRIPTS[script].partition(":")
    program = f"""
import sys
from {module} import {function}
sys.argv = [{script!r}, *{arguments!r}]
try:
    {function}()
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if arguments == ["--help"]:
        assert done.returncode == 0 and not done.stderr
        own = {"train": "--workdir", "evaluate": "--model", "plan": "--topology"}
        assert f"python -m {module} " in done.stdout
        assert f"  {own.get(script.removeprefix('distill-'), '--output')}\n" in done.stdout
    else:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_help_to_a_reader_that_has_gone():
    line = f"set -o pipefail; {sys.executable} -m distill.main --help | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_full_help_is_no_failure():
    done = run("distill.main", "--helpfull")
    assert done.returncode == 0 and "run_with_pdb" in done.stdout


# ---- the page of all keys ----


def test_committed_page_is_that_of_the_schema():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == config_reference.page(), "python -m distill.config.words > docs/configuration.md"


def test_reference_has_every_key_with_its_default():
    names = {key.name for key in config_reference.all_keys()}
    sections = {key.section for key in config_reference.all_keys()}
    assert names | sections - {""} == {*known_keys()} - {"teachers"}, "the names are the user's"
    keys = {key.name: key for key in config_reference.all_keys()}
    assert keys["data.max_samples"].kind == "int or None"
    assert keys["distillation.jsd_beta"].allowed == "0 to 1"
    assert keys["plugins"].default == "()" and keys["policy.model_name"].default == "''"


# ---- completion ----


def complete(*words: str) -> list[str]:
    """What bash offers for the last of the words, which are cut as bash cuts them."""
    listed = " ".join(f"'{word}'" for word in words)
    script = f"{bash_script()}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _distill\n"
    command = ["bash", "-c", script + 'printf "%s\\n" "${COMPREPLY[@]}"']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


PROGRAM = ("python", "-m", "distill.main")


def test_keys_are_completed():
    assert complete(*PROGRAM, "--config.distillation.jsd_b") == ["--config.distillation.jsd_beta="]
    offered = complete(*PROGRAM, "--config.")
    assert len(offered) == len(list(config_reference.all_keys()))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("--config.policy.precision", "="), ["bfloat16", "float32"]),
        (("--config.policy.precision", "=", "fl"), ["float32"]),
        (("--config.logger.progress_bar", "=", ""), ["True", "False"]),
        (("--config.distillation.max_steps", "=", "1"), []),
    ],
)
def test_choices_are_completed(words, offered):
    assert complete(*PROGRAM, *words) == offered


def test_other_commands_of_python_are_left_to_bash():
    assert complete("python", "-m", "http.server", "--config.") == []


# ---- the environment ----


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("JAX_PLATFORMS", "nosuch", "devices of JAX_PLATFORMS='nosuch': install"),
        ("JAX_ENABLE_X64", "1", "JAX_ENABLE_X64 is on"),
    ],
)
def test_variables_of_jax_that_do_not_fit_are_one_line(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    done = run("distill.preflight", "--config=arithmetic")
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# ---- dry run ----

TINY = """
import sys
sys.path.insert(0, {tests!r})
from tiny_runs import tiny_config

def get_config():
    return tiny_config(lambda_=0.5)
"""


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_dry_run_prints_config_and_plan_and_writes_nothing(tmp_path):
    tiny_config()  # makes the models
    (tmp_path / "tiny.py").write_text(TINY.format(tests=str(ROOT / "tests")))
    before = files(tmp_path), files(ROOT / "distill")
    arguments = (f"--config={tmp_path}/tiny.py", f"--workdir={tmp_path}/run", "--dry_run")
    done = run("distill.main", *arguments, "--config.distillation.max_steps=7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "distillation.lambda_=0.5  (default: 1.0)" in lines
    assert "distillation.max_steps=7  (default: 1000)" in lines
    assert "distillation.kl_type=forward" in lines, "a default"
    printed = {line.partition("=")[0] for line in lines}
    names = {key.name for key in config_reference.all_keys()}
    assert {name for name in names if not name.startswith("teachers.NAME.")} <= printed
    [devices] = [line for line in lines if line.startswith("devices")]
    assert "8 of cpu:8, mesh data=8" in devices
    assert any(line.endswith(": fits") for line in lines)
    assert (files(tmp_path), files(ROOT / "distill")) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.mesh.data=3"], "mesh.data=3"),
        (
            [
                "--config.policy.train_micro_batch_size=2",
                "--config.policy.train_global_batch_size=4",
            ],
            "policy.train_micro_batch_size=2 does not divide over 8 devices",
        ),
        (["--config.distillation.kl_type=nosuch"], "'nosuch'"),
        (["--config.distillation.loss_implementation=pallas"], "cannot run on cpu"),
        (["--config.data.prompt_template=no field"], "must have {problem} exactly once"),
        (["--config.data.split=nosuch"], "no split 'nosuch'"),
        (["--config.data.validation.split=nosuch"], "no split 'nosuch'"),
        (["--config.data.name=jsonl", "--config.data.path=/nosuch.jsonl"], "/nosuch.jsonl"),
        (["--config.policy.model_name=/nosuch"], "/nosuch"),
        (["--config.logger.writers=wandb"], "pip install wandb"),
    ],
)
def test_dry_run_refuses_what_a_run_would_refuse(overrides, words):
    done = run("distill.main", "--config=configs/arithmetic.py", "--dry_run", *overrides)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


class Device:
    def __init__(self, platform: str, device_kind: str):
        self.platform, self.device_kind = platform, device_kind


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", topology.CHIPS["v5e"]),
        ("TPU v5", topology.CHIPS["v5p"]),
        ("TPU v5p", topology.CHIPS["v5p"]),
        ("TPU v6 lite", topology.CHIPS["v6e"]),
        ("TPU7x", topology.CHIPS["tpu7x"]),
        ("NVIDIA H100 80GB HBM3", topology.GPUS["h100"]),
        ("NVIDIA A100-SXM4-80GB", topology.GPUS["a100"]),
    ],
)
def test_devices_are_known_by_their_kind(kind, chip, monkeypatch):
    monkeypatch.setattr(topology.jax, "devices", lambda: [Device("any", kind)] * 4)
    assert topology.topology_here().chip == chip and topology.topology_here().count == 4


@pytest.mark.parametrize("kind", ["NVIDIA L4", "NVIDIA A100-SXM4-40GB"])
def test_unknown_devices_are_named(kind, monkeypatch):
    monkeypatch.setattr(topology.jax, "devices", lambda: [Device("gpu", kind)])
    with pytest.raises(UserError, match=f"{kind}.*distill.plan"):
        topology.topology_here()
