"""Hostile models, answers and servers: nothing of theirs is run, and no secret is given away."""

import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import vllm_double as doubles
from safetensors.numpy import save_file
from tiny_runs import tiny_config

import distill
from distill.base.errors import UserError, printable
from distill.base.mesh import make_mesh
from distill.build import fixed_data
from distill.build.models import build_model
from distill.config import cli
from distill.config.parse import parse_config
from distill.data.base import Example
from distill.data.table import InMemoryDataset
from distill.data.tokenizer import load_tokenizer
from distill.evaluation.grading import Grader
from distill.generate import generate
from distill.models.checkpoints.hub import ASSETS
from distill.rollout.vllm.client import RequestRefused, ServerFailed, VllmClient
from distill.rollout.vllm.server import OwnServer

ROOT = Path(__file__).parents[1]
MARK = "pl4nted-s3cret"  # in every secret
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}-1",
    "WANDB_API_KEY": f"{MARK}-2",
    "MY_SERVERS_PASS": f"{MARK}-3",  # what api_key_variable names
}
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


# ---- models ----


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_plain_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb, protocol=2))


def write_torch_archive(path: Path, bomb: Bomb) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb, protocol=2))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model without its weights."""
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "arithmetic-student", folder)
    (folder / "model.safetensors").unlink()
    return folder


def load_weights(folder: Path):
    mesh = make_mesh(devices=jax.devices()[:1])
    types = dict(dtype="float32", param_dtype="float32", remat="none", max_length=8)
    return build_model(folder, mesh, **types)


@pytest.mark.parametrize("write", [write_plain_pickle, write_torch_archive])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "has neither .* but pytorch_model.bin: only safetensors are read"),
        ("consolidated.00.pth", "but consolidated.00.pth: only safetensors are read"),
        ("model.safetensors", "model.safetensors is not a readable .*: only safetensors are read"),
    ],
)
def test_pickles_are_refused_by_name_and_never_opened(folder, tmp_path, write, name, words):
    exploded = tmp_path / "exploded"
    write(folder / name, Bomb(exploded))
    with pytest.raises(UserError, match=words) as error:
        load_weights(folder)
    assert "save it again with save_pretrained" in str(error.value)
    assert not exploded.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../w.safetensors", "/etc/w.safetensors", ""]
)
def test_index_names_only_safetensors_beside_it(folder, name):
    save_file({"w": np.zeros(1, np.float32)}, folder.parent / "w.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"names {re.escape(repr(name))}, no file beside it"):
        load_weights(folder)


RESTORE = """
import sys
from pathlib import Path
import jax, numpy
from distill.run.checkpoint import Checkpoints
state = {"weights": jax.numpy.arange(4.0), "step": jax.numpy.zeros((), "int32")}
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
checkpoints.save(1, state, {"config": {"seed": 0}})
checkpoints.close()
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
found = []
# Raised for every name that a pickle, in C or in Python, asks for.
sys.addaudithook(lambda name, args: found.append(args) if name == "pickle.find_class" else None)
assert checkpoints.record(1) == {"config": {"seed": 0}}
shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in state.items()}
restored = checkpoints.restore(1, shapes)
assert restored["weights"].tolist() == [0, 1, 2, 3]
assert not found, found
import pickle; pickle.loads(pickle.dumps(Path()))  # the hook works
assert found
"""


def test_checkpoints_are_restored_without_unpickling(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", RESTORE, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert not kinds & {".pkl", ".pickle", ".bin", ".pt"}, kinds


def test_trust_remote_code_is_nowhere_but_refused():
    for path in [*ROOT.glob("distill/**/*.py"), *ROOT.glob("configs/*.py")]:
        for line in path.read_text().splitlines():
            assert "trust_remote_code" not in line or "trust_remote_code=False" in line, path


def test_code_in_a_model_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        value = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        content["auto_map"] = {key: value, "AutoModelForCausalLM": "evil.Evil"}
        content["tokenizer_class"] = "Evil"
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run its code"))
    try:
        load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    with pytest.raises(UserError, match="auto_map"):
        load_weights(folder)
    assert not ran.exists()


# ---- secrets and file modes, in whole runs ----

EXPERIMENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny_runs import tiny_config

def get_config():
    config = tiny_config(max_steps=2)
    config.policy.generation.vllm.api_key_variable = "MY_SERVERS_PASS"
    return config
"""


def run_with_umask(folder: Path, umask: int) -> tuple[Path, str]:
    """A whole run by the command line; its workdir and all that it printed."""
    (folder / "experiment.py").write_text(EXPERIMENT)
    workdir = folder / "run"
    command = [sys.executable, "-m", "distill.main", f"--config={folder}/experiment.py"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, **SECRETS, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        umask=umask,
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout + done.stderr


@pytest.fixture(scope="module")
def open_run(tmp_path_factory) -> tuple[Path, str]:
    return run_with_umask(tmp_path_factory.mktemp("open"), 0)


def modes(workdir: Path) -> dict[str, int]:
    paths = [workdir, *workdir.rglob("*")]
    assert len(paths) > 30
    return {str(path): stat.S_IMODE(path.lstat().st_mode) for path in paths}


def test_no_secret_is_left_by_a_run(open_run):
    workdir, printed = open_run
    names = {path.name for path in workdir.iterdir()}
    assert {"metrics.jsonl", "tensorboard", "checkpoints", "results.json", "student"} <= names
    contents = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    size = sum(map(len, contents.values()))
    print(f"{len(contents)} files, {size} bytes, and {len(printed)} characters printed")
    assert size > 100_000
    for path, content in contents.items():
        assert MARK.encode() not in content, path
    assert "data: 64 prompts (55 distinct)" in printed and "validation data: 8 prompts" in printed
    assert MARK not in printed


def test_nobody_else_may_write_even_where_the_umask_would_let_them(open_run):
    """Commands narrow the umask by this one bit; all else is the user's choice."""
    shared = modes(open_run[0])
    assert not [path for path, mode in shared.items() if mode & stat.S_IWOTH]
    assert all(mode & stat.S_IRGRP for mode in shared.values())


def test_no_mode_is_wider_than_the_umask_allows(tmp_path):
    private = modes(run_with_umask(tmp_path, 0o077)[0])
    assert not [path for path, mode in private.items() if mode & 0o077]


def test_weights_are_as_readable_as_the_rest_of_an_export(open_run):
    student = open_run[0] / "student"
    assert (student / "model.safetensors").stat().st_mode == (
        student / "config.json"
    ).stat().st_mode


@pytest.mark.parametrize("status", [400, 401, 500])
def test_server_that_repeats_the_key_gives_nothing_away(status):
    server = doubles.Double()

    def repeat(handler):
        return doubles.reply(handler, {"error": dict(handler.headers)}, status)

    server.faults += [("/v1/models", repeat)]
    try:
        with pytest.raises((RequestRefused, ServerFailed, UserError)) as error:
            VllmClient(server.url, SECRETS["MY_SERVERS_PASS"], timeout=5).get("/v1/models")
    finally:
        server.close()
    assert str(status) in str(error.value) and MARK not in str(error.value)


def test_failing_run_does_not_show_its_key(models, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    server = doubles.Double(api_key="another")
    config = tiny_config()
    config.policy.model_name = models["student"]
    config.distillation.teacher_model_path = models["teacher"]
    config.policy.generation.backend = "vllm"
    config.policy.generation.vllm.urls = (server.url,)
    config.policy.generation.vllm.api_key_variable = "MY_SERVERS_PASS"
    try:
        with pytest.raises(UserError, match="does not accept the API key") as error:
            distill.train(config, tmp_path)
    finally:
        server.close()
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    output = "".join(capfd.readouterr()) + str(error.value)
    assert MARK not in output and not any(MARK.encode() in content for content in contents)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.model_name", f"https://user:{MARK}@host/model"),
        ("data.path", f"https://host/d.jsonl?access_token={MARK}"),
        ("policy.generation.vllm.server_args", ("--chat-template", f"http://{MARK}@host")),
    ],
)
def test_urls_with_secrets_are_refused_before_they_are_stored(key, value):
    with pytest.raises(UserError, match=f"'{key}' holds a URL with a password") as error:
        parse_config(config_with(key, value))
    assert MARK not in str(error.value)


@pytest.mark.parametrize("argument", [f"--api-key={MARK}", "--api-key", f"--hf-token={MARK}"])
def test_keys_as_arguments_of_a_server_are_refused(argument):
    config = config_with("policy.generation.vllm.server_args", (argument, MARK))
    config.policy.generation.backend = "vllm"
    config.policy.generation.vllm.python = "python"
    with pytest.raises(UserError, match="server_args.*api_key_variable") as error:
        parse_config(config)
    assert MARK not in str(error.value)


def config_with(key: str, value):
    config = tiny_config()
    *sections, name = key.split(".")
    section = config
    for each in sections:
        section = section[each]
    section[name] = value
    return config


def test_error_lines_hide_secrets_that_others_repeat(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    with pytest.raises(SystemExit):
        cli._fail(f"401 for https://u:{MARK}@host/?key={MARK} with {SECRETS['HF_TOKEN']}")
    line = capsys.readouterr().err
    assert MARK not in line
    assert line == "error: 401 for https://...@host/?... with $HF_TOKEN\n"


# ---- the server that a run starts ----


def test_own_server_listens_on_loopback_and_its_key_is_no_argument(tmp_path, monkeypatch):
    started = {}

    def popen(command, **options):
        started.update(command=command, environment=options["env"])

    monkeypatch.setattr(subprocess, "Popen", popen)
    server = OwnServer(
        "python", tmp_path / "log", dtype="float32", max_model_len=8, api_key="", extra_args=()
    )
    url = server.launch(tmp_path)
    command = started["command"]
    assert command[command.index("--host") + 1] == "127.0.0.1" and "127.0.0.1" in url
    assert len(server.api_key) >= 32 and started["environment"]["VLLM_API_KEY"] == server.api_key
    assert not any(server.api_key in argument for argument in command)


# ---- answers ----

HOSTILE_ANSWERS = [
    r"\boxed{9^{9^{9^9}}}", r"\boxed{9^{9^{9^{9^{9}}}}}", "9**9**9**9", r"\boxed{2^{10^{10}}}",
    r"\boxed{(((9^9)^9)^9)^9)^9}", r"\boxed{-9^{-9^{9^{9}}}}", r"\boxed{0.1^{9^{9^{9}}}}",
    r"\boxed{((3!)!)!}", r"\boxed{(((3!)!)!)!}", r"\boxed{99999999!}", r"\boxed{9!!!!!!!!!!!!!!!!}",
    r"\boxed{\binom{10^9}{5\cdot10^8}}", r"\boxed{\sum_{i=1}^{10^{9}} i^{i}}",
    r"\boxed{\prod_{i=1}^{10^9} i}", r"\boxed{\int_0^{10^9} x^{x^x} dx}", r"\boxed{\sqrt[10^9]{7}}",
    r"\boxed{\log_{10^{-999}} 10^{999999}}", r"\boxed{\frac{1}{0}}", r"\boxed{0^0}",
    r"\boxed{\infty-\infty}", r"\boxed{10^{999999}-10^{999998}}", r"\boxed{1" + "0" * 10**6 + "}",
    r"\boxed{" + "9" * 5000 + "^9}", r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    r"\boxed{" * 3000 + "1" + "}" * 3000, r"\boxed{" * 10**5, "}" * 10**5, "{" * 10**5, "$" * 10**5,
    "\\" * 10**5, r"\frac{1}{" * 2000 + "1" + "}" * 2000, r"\sqrt{" * 2000 + "1" + "}" * 2000,
    r"\boxed{" + "1+" * 50_000 + "1}", r"\boxed{" + "x^" * 2000 + "x}", "x" * 2**20,
    r"\frac{a}{b} " * (2**20 // 12), r"\begin{pmatrix}" + "1 & " * 10**5 + r"1\end{pmatrix}",
    r"\boxed{\{" + "1," * 10**5 + r"1\}}", "\0", "\\boxed{\0}", "\\boxed{\ud800}", "\udfff" * 1000,
    "\u202e\\boxed{1}", "\x1b[31m\\boxed{1\x1b}", "", " " * 10**6, "\n" * 10**6, "٣" * 5000,
    "the answer is " * 50_000, "1," * 10**5, "1 " * 10**5, "-" * 10**5 + "1", "." * 10**5,
    r"\boxed{\text{" + "a" * 10**5 + "}}", r"\boxed{__import__('os').system('true')}",
    r"\boxed{x\mapsto\operatorname{exec}(1)}", r"\boxed{1=2=3=4<5<6}", r"\boxed{x^{1000}-1=0}",
    r"\boxed{(x+1)^{100000}}", r"\boxed{\sin(10^{10^{10}})}", "<think>" * 10**5,
]  # fmt: skip
TIME_LIMIT = 1.0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_proc
def test_hostile_answers_are_right_or_wrong_in_bounded_time_and_memory():
    assert len(HOSTILE_ANSWERS) >= 40
    responses = [*HOSTILE_ANSWERS, r"\boxed{7}"]
    examples = [Example("p", None, "7", str(i)) for i in range(len(responses))]
    before, start = resident_bytes(), time.monotonic()
    with Grader(time_limit=TIME_LIMIT, workers=4) as grader:
        verdicts = grader.grade(InMemoryDataset(examples), examples, responses)
        seconds = time.monotonic() - start
        # The pool works on, whatever became of its processes.
        again = grader.grade(InMemoryDataset(examples[-2:]), examples[-2:], ["8", r"\boxed{7}"])
    grown = (resident_bytes() - before) / 2**20
    print(f"{len(responses)} answers, {grader.timeouts} timeouts, {grader.crashes} crashes, "
          f"{seconds:.0f} s, {grown:.0f} MiB")  # fmt: skip
    assert verdicts[-1] and not any(verdicts[:-1])
    assert again == [False, True]
    # The limit, 3 s of patience before a process is killed, and the start of another.
    assert seconds < 20 + (grader.timeouts + grader.crashes) * (TIME_LIMIT + 3 + 10) / 2
    assert grown < 100


def test_hostile_references_are_survived_too():
    references = [r"\boxed{9^{9^{9^9}}}", "", "\ud800", "{" * 1000, "\0", r"\frac{1}{0}"]
    examples = [Example("p", None, reference, str(i)) for i, reference in enumerate(references)]
    with Grader(time_limit=TIME_LIMIT, workers=2) as grader:
        verdicts = grader.grade(InMemoryDataset(examples), examples, ["1"] * len(examples))
    assert not any(verdicts)


ORPHANS = r"""
import multiprocessing, sys, threading, time
from distill.data.base import Example
from distill.data.table import InMemoryDataset
from distill.evaluation.grading import Grader
examples = [Example("p", None, "1", str(i)) for i in range(4)]
responses = [r"\boxed{9^{9^{9^9}}}"] * 4

def report():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.1)
    time.sleep(8)  # they are computing by then
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)

threading.Thread(target=report, daemon=True).start()
with Grader(time_limit=600) as grader:
    grader.grade(InMemoryDataset(examples), examples, responses)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_workers_end_with_a_killed_parent_in_the_midst_of_a_power():
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_computing, workers))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while any(map(is_computing, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_computing(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# ---- what reaches a terminal ----

ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e\u2066\x9b31m\u200b\u2028 \r\n\0"


def test_printable_spells_out_what_drives_a_terminal():
    shown = printable(f"a{ESCAPES}b")
    assert shown.isprintable()
    assert shown == (r"a\x1b[2J\x1b]0;title\x07\u202e\u2066\x9b31m\u200b \x00b")
    assert printable("déjà vu, 日本語, π") == "déjà vu, 日本語, π"


def test_error_lines_drive_no_terminal(capsys):
    with pytest.raises(SystemExit) as end:
        cli._fail(f"config key '{ESCAPES}' " + "x" * 10**6)
    assert end.value.code == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isprintable() and len(line) < 2100


def test_answers_of_models_reach_files_escaped_and_terminals_not_at_all(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(
        fixed_data, "decode_responses", lambda _, rollout: [ESCAPES] * len(rollout.lengths_b)
    )
    config = tiny_config()
    config.data.max_samples = 8
    config.distillation.generate_strategy.max_length = 24
    config.policy.max_total_sequence_length = 48
    output = tmp_path / "answers.jsonl"
    counts = generate(config, "embedded:arithmetic-student", output)
    assert counts["written"] > 0
    lines = output.read_bytes().decode("ascii").splitlines()
    assert all(line.isprintable() for line in lines)
    assert json.loads(lines[0])["response"] == ESCAPES
    printed = "".join(capfd.readouterr())
    assert "title" not in printed and "\u202e" not in printed
