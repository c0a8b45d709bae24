"""The vLLM backend against a stand-in: faults, retries, and what is asked of servers."""

import collections
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import vllm_double as doubles
from tiny_runs import read_metrics, tiny_config, with_models
from vllm_double import Double, answer_tokens

import distill
from distill.base.errors import RunStopped, UserError
from distill.config.policy import VllmServers
from distill.config.policy import VllmTeacher as TeacherSection
from distill.data.sequences import Sequences
from distill.data.tokenizer import Vocabulary, load_tokenizer
from distill.rollout.vllm import checks, guard
from distill.rollout.vllm.backend import VllmBackend
from distill.rollout.vllm.client import VllmClient, read_api_key
from distill.rollout.vllm.probe import Probe
from distill.rollout.vllm.rows import request_seed, turn_seed
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest
from distill.teachers.server import ServerTeacher

COMPLETIONS = "/v1/completions"
PARAMS = SamplingParams(max_length=doubles.LENGTH)
TEMPERED = SamplingParams(max_length=doubles.LENGTH, temperature=0.7)
PROMPTS = tuple(np.array([2 + i, 5, 7], np.int32) for i in range(6))
REQUEST = RolloutRequest(PROMPTS, np.arange(6) + 40, PARAMS, num_generations=2, seed=3, step=8)


class Folders:
    """Weights that are nothing but the name of their version."""

    def merged(self, params):
        return params

    def write(self, params, version):
        return Path(f"/weights/{params}-{version}")

    def write_rehearsal(self, params):
        return Path("/weights/rehearsal")

    def drop_rehearsal(self):
        pass


class Believing:
    """A probe that finds every server right."""

    def expected(self, params):
        return np.zeros((1, 1))

    expected_in_rehearsal = expected

    def look(self, client, expected):
        client.get("/health")

    def verify(self, client, expected, far_apart):
        self.look(client, expected)
        return 0.0


@pytest.fixture
def servers():
    made = []

    def make(count=1, **options):
        made.extend(Double(**options) for _ in range(count))
        return made[-count:]

    yield make
    for server in made:
        server.close()


def make_backend(
    servers, *, params=PARAMS, retry=20.0, request=10.0, api_key_variable="", num_held=1
) -> VllmBackend:
    section = VllmServers(
        urls=tuple(server.url for server in servers),
        api_key_variable=api_key_variable,
        request_timeout=request,
        retry_timeout=retry,
        start_timeout=1.0,
    )
    return VllmBackend(
        section,
        own=None,
        check=lambda client: None,
        weights=Folders(),
        probe=Believing(),
        params=params,
        vocabulary=Vocabulary(Letters(), doubles.VOCAB_SIZE, (1,)),
        max_length=doubles.MAX_MODEL_LEN,
        num_held=num_held,
    )


def refitted(servers, **options) -> VllmBackend:
    backend = make_backend(servers, **options)
    backend.refit("student", version=1)
    for server in servers:
        server.requests.clear()
    return backend


def expected_tokens(request=REQUEST, weights="/weights/student-1") -> list[list[int]]:
    count = request.num_generations
    return [
        answer_tokens(prompt.tolist(), request_seed(request, i, j), weights)
        for i, prompt in enumerate(request.prompts)
        for j in range(count)
    ]


def assert_whole(rollout: Rollout, request=REQUEST) -> None:
    """Every row answered, in order, with the refitted weights."""
    assert rollout.tokens_br.tolist() == expected_tokens(request)
    assert rollout.lengths_b.tolist() == [doubles.LENGTH] * request.num_rows
    assert rollout.stopped_b.all()


def test_rows_come_back_in_order_with_their_own_seeds(servers):
    backend = refitted(servers(2))
    rollout, measured = backend.generate(REQUEST)
    assert_whole(rollout)
    assert len(np.unique(rollout.tokens_br, axis=0)) > 6
    np.testing.assert_allclose(rollout.log_probs_br[0], [-0.25, -0.5, -0.75, -1.0])
    np.testing.assert_array_equal(rollout.sampled_log_probs_br, rollout.log_probs_br)
    assert rollout.log_probs_br.dtype == np.float32 and rollout.tokens_br.dtype == np.int32
    assert measured == {"generation/retries": 0, "generation/refit_gap": 0}


def test_seed_depends_on_all_parts_and_on_nothing_else():
    seeds = {
        request_seed(dataclasses.replace(REQUEST, seed=seed, step=step), i, j)
        for seed in (0, 1)
        for step in (0, 1)
        for i in range(6)
        for j in (0, 1)
    }
    assert len(seeds) == 48 and all(0 <= seed < 2**63 for seed in seeds)
    seeds |= {turn_seed(seed, turn) for seed in seeds for turn in (0, 1, 2)}
    assert len(seeds) == 3 * 48, "the first turn has the row's"
    alone = dataclasses.replace(REQUEST, prompts=PROMPTS[4:5], prompt_index=np.array([44]))
    assert request_seed(alone, 0, 1) == request_seed(REQUEST, 4, 1)


class Echo:
    """Says one token after the first turn of even rows, and never anything of odd ones."""

    def __init__(self, rows: int):
        self.asked: list[list[list[int]]] = [[] for _ in range(rows)]
        self.begun = [0] * rows

    def begin(self, row):
        self.asked[row], self.begun[row] = [], self.begun[row] + 1

    def reply(self, row, tokens_t):
        self.asked[row].append(tokens_t.tolist())
        return np.array([7]) if row % 2 == 0 and len(self.asked[row]) == 1 else None


@pytest.mark.parametrize("restarts", [False, True])
def test_dialogues(servers, restarts):
    """Each turn is asked for with the sequence so far; one whose server restarted begins anew."""
    (server,) = servers()
    params = dataclasses.replace(TEMPERED, max_length=2 * doubles.LENGTH + 2)
    turns = Echo(REQUEST.num_rows)
    limits = np.full(12, params.max_length, np.int32)
    limits[[0, 2]] = doubles.LENGTH + 1, doubles.LENGTH + 3  # no room for a turn, and for a whole
    request = dataclasses.replace(REQUEST, params=params, turns=turns, max_lengths=limits)
    backend = refitted([server], params=params)
    if restarts:
        server.faults += [(COMPLETIONS, lambda handler: False)] * 20
        server.faults.append((COMPLETIONS, lambda handler: server.restart()))
    rollout, _ = backend.generate(request)
    assert set(turns.begun) == {1 + restarts}
    for row in range(REQUEST.num_rows):
        prompt, seed = PROMPTS[row // 2].tolist(), request_seed(REQUEST, row // 2, row % 2)
        first = answer_tokens(prompt, seed, "/weights/student-1")
        second = answer_tokens([*prompt, *first, 7], turn_seed(seed, 1), "/weights/student-1")
        room = limits[row] - doubles.LENGTH - 1
        tokens = [*first, 7, *second[:room]] if row % 2 == 0 and room else first
        length = rollout.lengths_b[row]
        assert rollout.tokens_br[row, :length].tolist() == tokens
        assert rollout.stopped_b[row] == (row not in (0, 2))
        asked = [first, second] if len(tokens) == 9 else [first]
        assert turns.asked[row] == asked
        sampled = [i != doubles.LENGTH for i in range(length)]
        assert rollout.sampled_br[row, :length].tolist() == sampled
        # Scored at once for all turns; the double says -0.5 - token.
        expected = np.where(sampled, -0.5 - rollout.tokens_br[row, :length], 0)
        np.testing.assert_allclose(rollout.log_probs_br[row, :length], expected)
        drawn = rollout.sampled_log_probs_br[row, doubles.LENGTH : length]
        np.testing.assert_allclose(drawn, [0, -0.25, -0.5, -0.75, -1.0][: len(drawn)])
    np.testing.assert_array_equal(rollout.columns["weight"], rollout.sampled_br)


def test_request_says_every_sampling_option(servers):
    (server,) = servers()
    params = dataclasses.replace(TEMPERED, top_k=5, top_p=0.9, min_p=0.01)
    backend = refitted([server], params=params)
    backend.generate(dataclasses.replace(REQUEST, params=params))
    # Rows are asked for at once: any of them may arrive first.
    asked = [body for path, body in server.requests if path == COMPLETIONS]
    body = next(body for body in asked if body["prompt"] == [2, 5, 7])
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (0.7, 5, 0.9, 0.01)
    # What a model's generation_config.json would otherwise decide.
    assert body["repetition_penalty"] == 1.0 and body["ignore_eos"] is True
    assert body["stop_token_ids"] == [1] and body["max_tokens"] == doubles.LENGTH


@pytest.mark.parametrize("name", doubles.FAULTS)
def test_one_fault_loses_nothing(servers, name):
    (server,) = servers()
    backend = refitted([server], request=0.5 if name == "too_slow" else 10.0)
    server.faults.append((COMPLETIONS, doubles.FAULTS[name]))
    rollout, measured = backend.generate(REQUEST)
    assert_whole(rollout)
    assert measured["generation/retries"] == 1


def test_scores_of_a_tempered_answer_are_tried_again_too(servers):
    (server,) = servers()
    backend = refitted([server], params=TEMPERED)
    request = dataclasses.replace(REQUEST, params=TEMPERED)
    server.faults += [(COMPLETIONS, lambda handler: False)] * 3
    server.faults.append((COMPLETIONS, doubles.half_an_answer))
    rollout, _ = backend.generate(request)
    assert_whole(rollout, request)
    # The double says -0.25 (1 + i) of what it samples, and -0.5 - token of what it scores.
    np.testing.assert_allclose(rollout.sampled_log_probs_br[0], [-0.25, -0.5, -0.75, -1.0])
    np.testing.assert_allclose(rollout.log_probs_br, -0.5 - rollout.tokens_br)


def test_rows_may_have_limits_of_their_own(servers):
    (server,) = servers()
    limits = np.array([1, 2] * 6, np.int32)
    request = dataclasses.replace(REQUEST, max_lengths=limits)
    rollout, _ = refitted([server]).generate(request)
    assert rollout.lengths_b.tolist() == limits.tolist() and not rollout.stopped_b.any()
    tokens = np.where(np.arange(doubles.LENGTH) < limits[:, None], expected_tokens(request), 0)
    np.testing.assert_array_equal(rollout.tokens_br, tokens)


def test_greedy_choice_is_certain(servers):
    params = dataclasses.replace(PARAMS, greedy=True)
    backend = refitted(servers(), params=params)
    rollout, _ = backend.generate(dataclasses.replace(REQUEST, params=params))
    assert (rollout.sampled_log_probs_br == 0).all() and (rollout.log_probs_br < 0).all()


def test_dead_server_is_one_line_that_names_it(servers):
    (server,) = servers()
    backend = refitted([server], retry=1.0)
    server.close()
    started = time.monotonic()
    with pytest.raises(RunStopped) as error:
        backend.generate(REQUEST)
    assert time.monotonic() - started < 5
    assert server.url in str(error.value) and "refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_server_that_hangs_does_not_hang_the_run(servers):
    (server,) = servers()
    backend = refitted([server], retry=0.0, request=0.3)
    server.faults += [(COMPLETIONS, doubles.too_slow)] * 100
    with pytest.raises(RunStopped, match="no answer to /v1/completions within 0.3 s"):
        backend.generate(REQUEST)


def test_other_servers_take_the_rows_of_a_dead_one(servers):
    alive, dead = servers(2)
    backend = refitted([alive, dead], retry=2.0)
    # Dies with rows under way, and then for good.
    dead.faults += [(COMPLETIONS, doubles.hang_up)] * 100
    dead.faults += [("/weight_info", doubles.hang_up)]
    rollout, measured = backend.generate(REQUEST)
    assert_whole(rollout)
    asked = collections.Counter(str(body["prompt"]) for _, body in alive.requests if "seed" in body)
    assert len(asked) == len(PROMPTS)


def test_server_that_restarts_is_refitted_before_it_goes_on(servers):
    (server,) = servers()
    backend = refitted([server])

    def restart(handler):
        server.restart()
        return doubles.hang_up(handler)

    server.faults += [(COMPLETIONS, lambda handler: False)] * 4 + [(COMPLETIONS, restart)]
    assert_whole(backend.generate(REQUEST)[0])
    assert server.loaded == "/weights/student-1"


def test_restart_that_failed_no_request_is_found_out(servers):
    (server,) = servers()
    backend = refitted([server])

    def restart(handler):
        server.restart()
        return False

    server.faults += [(COMPLETIONS, lambda handler: False)] * 4 + [(COMPLETIONS, restart)]
    rollout, measured = backend.generate(REQUEST)
    assert_whole(rollout)
    assert measured["generation/retries"] == REQUEST.num_rows


def test_server_that_restarts_all_the_time_stops_the_run(servers):
    (server,) = servers()
    backend = refitted([server])

    def restart(handler):
        server.restart()
        return False

    server.faults += [(COMPLETIONS, restart)] * 1000
    with pytest.raises(RunStopped, match="restarted 6 times in one batch"):
        backend.generate(REQUEST)


def test_server_that_another_run_refits_stops_the_run(servers):
    (server,) = servers()
    backend = refitted([server])
    server.version = "distill-other-7"
    with pytest.raises(RunStopped, match="somebody else.*'distill-other-7'"):
        backend.generate(REQUEST)


def test_refused_refit_is_one_line(servers):
    (server,) = servers()
    backend = make_backend([server])
    server.faults.append(("/collective_rpc", doubles.engine_died))
    with pytest.raises(UserError) as error:
        backend.refit("student", version=1)
    assert "refused" in str(error.value) and "/weights/rehearsal" in str(error.value)
    assert "EngineCore" in str(error.value) and "\n" not in str(error.value)


def test_refit_waits_for_a_server_that_restarts(servers):
    (server,) = servers()
    backend = make_backend([server])
    server.faults += [("/pause", doubles.hang_up), ("/collective_rpc", doubles.hang_up)]
    backend.refit("student", version=1)
    assert_whole(backend.generate(REQUEST)[0])


def test_servers_load_waiting_weights_for_the_first_request_that_names_them(servers):
    """A refit that comes meanwhile leaves theirs alone; what is too old is not served."""
    pair = servers(2)
    backend = make_backend(pair, num_held=2)
    backend.refit("student", version=1)
    backend.refit("student", version=2)
    assert {server.loaded for server in pair} == {"/weights/student-1"}
    for version in (1, 2):
        for _ in range(2):
            rollout, _ = backend.generate(dataclasses.replace(REQUEST, version=version))
            weights = f"/weights/student-{version}"
            assert rollout.tokens_br.tolist() == expected_tokens(weights=weights)
        loads = [path for server in pair for path, _ in server.requests if "rpc" in path]
        assert len(loads) == 2 * (1 + version), "of a rehearsal, and once each"
    backend.refit("student", version=3)
    with pytest.raises(RuntimeError, match="no weights of 1 updates are held"):
        backend.generate(dataclasses.replace(REQUEST, version=1))
    pair[0].restart()
    rollout, _ = backend.generate(dataclasses.replace(REQUEST, version=2))
    assert rollout.tokens_br.tolist() == expected_tokens(weights="/weights/student-2")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([5, 1, 6, 1], "neither at"), ([5, 6], "neither at"), ([5, 99, 1], "sampled id 99")],
)
def test_answer_that_ends_elsewhere_or_has_padding_ids_stops_the_run(servers, tokens, words):
    (server,) = servers()
    backend = refitted([server])
    log_probs = {"token_logprobs": [-1.0] * len(tokens)}
    choice = {"token_ids": tokens, "logprobs": log_probs, "finish_reason": "stop"}
    server.faults.append(
        (COMPLETIONS, lambda handler: doubles.reply(handler, {"choices": [choice]}))
    )
    with pytest.raises(RunStopped, match=words):
        backend.generate(REQUEST)


def test_generate_before_refit_is_an_error(servers):
    with pytest.raises(RuntimeError, match="before refit"):
        make_backend(servers()).generate(REQUEST)


def test_prompt_longer_than_the_context(servers):
    backend = refitted(servers())
    long = (np.full(61, 5, np.int32),)
    request = dataclasses.replace(REQUEST, prompts=long, prompt_index=np.array([0]))
    with pytest.raises(
        UserError, match="a prompt of 61 tokens and 4 .*max_total_sequence_length=64"
    ):
        backend.generate(request)


def test_temperature_that_vllm_would_change():
    backend = make_backend([], params=dataclasses.replace(PARAMS, temperature=0.001))
    with pytest.raises(UserError, match="temperature=0.001.*0.01"):
        backend.start()


# ---- keys ----


def test_api_key_is_sent_and_never_shown(servers, monkeypatch):
    (server,) = servers(api_key="sesame")
    monkeypatch.setenv("SERVER_KEY", "sesame")
    assert_whole(refitted([server], api_key_variable="SERVER_KEY").generate(REQUEST)[0])
    monkeypatch.setenv("SERVER_KEY", "tomato")
    for wrong in ("", "SERVER_KEY"):
        with pytest.raises(UserError) as error:
            refitted([server], api_key_variable=wrong).generate(REQUEST)
        assert "API key" in str(error.value) and server.url in str(error.value)
        assert "tomato" not in str(error.value)


def test_api_key_variable_that_is_not_set(monkeypatch):
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with pytest.raises(UserError, match="teacher.vllm.api_key_variable") as error:
        read_api_key("SERVER_KEY", "teacher.vllm")
    assert "SERVER_KEY" not in str(error.value)  # it may be the key itself
    monkeypatch.setenv("SERVER_KEY", "two\nlines")
    with pytest.raises(UserError, match="characters"):
        read_api_key("SERVER_KEY", "teacher.vllm")


# ---- checks at the start ----


def closed_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_unreachable_server():
    url = closed_url()
    with pytest.raises(UserError) as error:
        make_teacher(url, start_timeout=0.5).start()
    for words in (url, "0.5 s", "teacher.vllm.urls", "teacher.vllm.start_timeout"):
        assert words in str(error.value)


def test_server_without_dev_mode_small_context_or_of_another_kind(servers):
    (server,) = servers()
    client = VllmClient(server.url)
    with pytest.raises(UserError, match="context of 64 tokens, but needs 65.*--max-model-len 65"):
        checks.check_context(client, 65)
    server.dev_mode = False
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        checks.check_dev_mode(client)
    server.faults.append(("/v1/models", lambda handler: doubles.reply(handler, {"data": []})))
    with pytest.raises(UserError, match="not as a vLLM server"):
        checks.check_context(client, 1)


def test_raw_log_probs_will_not_do_for_tempered_sampling(servers):
    (server,) = servers(logprobs_mode="raw_logprobs")
    client = VllmClient(server.url)
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        checks.check_log_probs_mode(client)


class Letters:
    """A tokenizer of lower-case letters; `first` is the id of the letter a."""

    all_special_ids, pad_token_id, eos_token_id = (), 0, 1

    def __init__(self, first=0):
        self.first = first

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def encode(self, text, add_special_tokens):
        return [ord(character) - 97 + self.first for character in text]


def test_other_tokenizer(servers):
    (server,) = servers()
    checks.check_same_tokenizer(VllmClient(server.url), Vocabulary(Letters(), 20, ()))
    with pytest.raises(UserError, match="another tokenizer.*id 0 where the student's makes 1"):
        checks.check_same_tokenizer(VllmClient(server.url), Vocabulary(Letters(1), 20, ()))


# ---- probe ----


def probe(**options) -> Probe:
    defaults = dict(vocab_size=20, max_length=32, row_multiple=1, max_gap=0.1, float32=False)
    return Probe(None, **{**defaults, **options})


def check(measured, new, before=None, far_apart=False, **options):
    measured, new = np.asarray(measured, np.float32), np.asarray(new, np.float32)
    before = before and tuple(np.asarray(x, np.float32) for x in before)
    return probe(**options).check("http://s", measured, new, before, far_apart=far_apart)


def test_probe_believes_what_agrees():
    assert check([-1.0, -2.0], [-1.01, -2.03]) == pytest.approx(0.02)


@pytest.mark.parametrize("measured", [[-1.0, -2.3], [-1.0, np.nan]])
def test_probe_refuses_what_differs(measured):
    with pytest.raises(RunStopped, match="http://s and the trainer differ"):
        check(measured, [-1.0, -2.0])


def test_probe_is_stricter_in_float32():
    with pytest.raises(RunStopped, match="allowed: 0.01"):
        check([-1.0, -2.05], [-1.0, -2.0], float32=True)


def test_probe_finds_the_old_answer_even_where_the_update_was_tiny():
    old, new = ([-1.001, -2.001], [-1.0, -2.0]), [-1.0001, -2.0001]
    assert check([-1.0012, -2.0011], new, before=old) < 0.01
    with pytest.raises(RunStopped, match="old one to the last bit"):
        check(old[0], new, before=old)
    assert check(old[0], old[1], before=old) < 0.01  # nothing changed


def test_probe_of_weights_that_are_far_apart_allows_a_share_of_the_distance():
    before = ([-1.0, -2.0], [-1.0, -2.0])
    assert check([-1.001, -2.001], [-1.1, -2.1], before=before, max_gap=9.0) < 0.1
    with pytest.raises(RunStopped, match="allowed: 0.01"):
        check([-1.08, -2.08], [-1.1, -2.1], before=before, far_apart=True)


def test_probe_names_the_tied_head():
    with pytest.raises(RunStopped, match="not take the new output head.*distill.export_server"):
        check([-3.0, -4.0], [-1.0, -2.0])


def test_probe_remembers_what_each_server_said_and_should_have_said(servers):
    """The double scores token i with -0.5 - i, whatever it has loaded."""
    client, other = (VllmClient(server.url) for server in servers(2))
    fixed = probe(max_length=8, max_gap=9.0)
    old = -0.5 - fixed.tokens_bt[:, 1:].astype(np.float32)
    np.testing.assert_array_equal(fixed.look(client, old), old)
    with pytest.raises(RunStopped, match="old one to the last bit"):
        fixed.verify(client, old + 0.5, far_apart=False)
    assert fixed.verify(other, old + 0.5, far_apart=False) == pytest.approx(0.5)


# ---- teacher ----


def make_teacher(url, top_k=3, vocab_size=doubles.VOCAB_SIZE, start_timeout=1.0) -> ServerTeacher:
    section = TeacherSection(
        urls=(url,), top_k=top_k, retry_timeout=5.0, start_timeout=start_timeout
    )
    return ServerTeacher(section, Vocabulary(Letters(), vocab_size, (1,)), max_length=32)


def test_teacher_lists_the_likeliest_and_the_actual_token(servers):
    """The double's likeliest are 0, 1, 2 and token i has log-probability -0.5 - i."""
    (server,) = servers()
    prompts = Sequences.of_tokens([[4, 4], [5, 6, 7]])
    sequences = prompts.join(Sequences.of_tokens([[2, 9], [8]], weight=1))
    teacher = make_teacher(server.url)
    teacher.start()
    scores = teacher.score(sequences)
    ids_nk, log_probs_nk = scores["teacher_ids"], scores["teacher_log_probs"]
    assert ids_nk.shape == log_probs_nk.shape == (8, 4)
    assert sorted(ids_nk[2]) == [-1, 0, 1, 2]  # the actual token is among the three
    assert sorted(ids_nk[3]) == [0, 1, 2, 9]
    assert sorted(ids_nk[7]) == [0, 1, 2, 8]
    assert (ids_nk[[0, 1, 4, 5, 6]] == -1).all()  # prompts
    known = ids_nk >= 0
    np.testing.assert_allclose(log_probs_nk[known], -0.5 - ids_nk[known])
    assert np.isfinite(log_probs_nk).all()


def test_teacher_with_padding_rows_gives_their_probability_to_the_others(servers):
    (server,) = servers()
    teacher = make_teacher(server.url, top_k=3, vocab_size=2)
    ids, log_probs = teacher._real(([1, 0, 2], [np.log(0.2), np.log(0.3), np.log(0.5)]))
    assert ids == [1, 0]
    np.testing.assert_allclose(np.exp(log_probs), [0.4, 0.6], rtol=1e-6)


def test_teacher_that_lists_fewer_tokens(servers):
    (server,) = servers()
    refusal = {"error": {"message": "Requested prompt logprobs of 3, max allowed: 2"}}
    server.faults.append((COMPLETIONS, lambda handler: doubles.reply(handler, refusal, 400)))
    with pytest.raises(UserError, match="top_k=3.*max allowed: 2.*--max-logprobs 3"):
        make_teacher(server.url).start()


def test_run_with_a_teacher_behind_servers(servers, models, tmp_path):
    """Its scores reach the step; nothing of it is evaluated, as no model of it is here."""
    (server,) = servers()
    tokenizer = load_tokenizer(Path(models["student"]))
    server.tokenize = lambda text: tokenizer.encode(text, add_special_tokens=False)
    config = with_models(tiny_config(max_steps=2), models)
    config.teacher.backend, config.teacher.vllm.urls = "vllm", (server.url,)
    config.teacher.vllm.top_k = 3
    result = distill.train(config, tmp_path)
    assert set(result.results) == {"base", "student"}
    assert result.results["student"]["forward_kl"] is None
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert len(lines) == 2
    # What the double says of token i is -0.5 - i: the teacher's mean is that of the ids.
    assert all(line["loss"] > 0.1 and line["teacher_log_prob"] < -0.5 for line in lines)
    assert "teacher/seconds" in (tmp_path / "metrics.jsonl").read_text()
    rows = config.policy.train_global_batch_size
    scored = [body for _, body in server.requests if body.get("prompt_logprobs") == 3]
    assert len(scored) == 2 * rows + 1  # and a trial at the start


# ---- the guard of an own server ----

KEEPER = """
import subprocess, sys, time
command = [sys.executable, "-I", sys.argv[1], sys.executable, "-c", sys.argv[2], sys.argv[3]]
subprocess.Popen(command, stdin=subprocess.PIPE)
time.sleep(600)
"""
# A server with a child, which ignores the polite signal, as its own.
SERVER = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and before it is read
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_own_server_and_its_children_end_when_the_trainer_is_killed(tmp_path):
    note = tmp_path / "pids"
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, guard.__file__, SERVER, str(note)], stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (note.exists() and len(note.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for pid in note.read_text().split()]
    assert all(map(is_running, pids))
    os.kill(keeper.pid, signal.SIGKILL)
    keeper.wait()
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
