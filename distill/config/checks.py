"""Which values do not go together."""

from __future__ import annotations

import math
import re
import urllib.parse

from distill.base.errors import UserError
from distill.config.changes import CONTENTS, classes
from distill.config.keys import NAMED
from distill.config.method import ENVIRONMENTS, OF_STUDENT, Distillation, OneTeacher, Teacher
from distill.config.objective_checks import check_objective
from distill.config.policy import KNOWN_BACKENDS, Policy, VllmServers
from distill.config.schema import (
    WRITERS,
    Config,
    all_teachers,
    named_teachers,
    schema_key,
    teacher_key,
)


def check_combinations(config: Config) -> None:
    """Raises UserError, one line, for values that are right one by one but not together."""
    _check_generation(config)
    check_objective(config)
    _check_batches(config.policy, config.distillation)
    _check_lengths(config)
    _check_teachers(config)
    _check_models(config)
    _check_lora(config)
    _check_vllm(config)
    _check_environment(config)
    _check_feedback(config)
    if unknown := set(config.logger.writers) - set(WRITERS):
        raise UserError(
            f"logger.writers names {', '.join(sorted(unknown))}: it takes {', '.join(WRITERS)}, "
            "or () for metrics.jsonl alone"
        )
    for name in config.checkpointing.allow_changes:
        if classes().get(schema_key(name)) != NAMED:
            raise UserError(
                f"checkpointing.allow_changes names {name!r}: it takes {', '.join(CONTENTS)}, and "
                "the keys that docs/configuration.md has as `named`"
            )


def _check_generation(config: Config) -> None:
    generation = config.policy.generation
    backend, colocated = generation.backend, generation.colocated
    is_own = backend not in KNOWN_BACKENDS
    # A plugin may register more: `build.import_plugins` looks.
    if is_own and (not config.plugins or backend == "megatron"):
        hint = "; megatron was the training framework's own engine, here that is jax"
        raise UserError(
            f"config key 'policy.generation.backend' is {backend!r}: allowed is "
            f"{', '.join(KNOWN_BACKENDS)}{hint if backend == 'megatron' else ''}"
        )
    if is_own and not colocated.enabled:
        raise UserError(
            "policy.generation.colocated.enabled=False splits the devices for the jax backend, not "
            f"for {backend!r}, which takes what it needs itself: leave it at True"
        )
    if generation.has_own_layout and backend != "jax":
        raise UserError(
            f"policy.generation.tensor={generation.tensor} and .width={generation.width} lay out "
            f"the jax backend's sampler, not {backend!r}'s: leave them at 0 and 1"
        )
    if config.policy.records_routes and (backend == "vllm" or not config.distillation.lambda_):
        key = "policy.generation.backend=vllm" if backend == "vllm" else "distillation.lambda_=0"
        raise UserError(
            f"policy.router_replay={config.policy.router_replay} needs the experts that a sampler "
            f"here picks, and there are none with {key}: set policy.router_replay=off"
        )
    if 0 < generation.importance_clip < 1:
        raise UserError(
            f"policy.generation.importance_clip={generation.importance_clip} limits the "
            "weights of tokens, and a token of the current student has weight 1: use 0 (off) or at "
            "least 1"
        )
    sampled = config.distillation.lambda_ > 0
    if generation.async_steps > 1 and sampled and not generation.importance_clip:
        raise UserError(
            f"policy.generation.async_steps={generation.async_steps} trains on tokens of students "
            f"up to {generation.async_steps} updates old, as if today's had sampled them: set "
            "policy.generation.importance_clip, such as 2, which weighs them, or async_steps=1"
        )
    if generation.async_steps and backend == "jax" and colocated.enabled:
        raise UserError(
            f"policy.generation.async_steps={generation.async_steps} samples during "
            "training, but sampler and trainer share all devices, where one waits for the other: "
            "set policy.generation.colocated.enabled=False, or async_steps=0"
        )
    for key, default in (("sampler_devices", 0), ("whole_processes", False)):
        if colocated.enabled and (value := getattr(colocated, key)):
            raise UserError(
                f"policy.generation.colocated.{key}={value} is for a sampler with its own devices: "
                f"set policy.generation.colocated.enabled=False, or {key}={default}"
            )


def _check_feedback(config: Config) -> None:
    for name, teacher in all_teachers(config).items():
        several = config.distillation.generate_strategy.num_generations > 1
        there_is = config.environment.name or (config.reward.function and several)
        if "{feedback}" in teacher.prompt_template and not there_is:
            raise UserError(
                f"{teacher_key(name, 'prompt_template')} names {{feedback}}: set environment.name, "
                "whose replies it has, or reward.function, and "
                "distillation.generate_strategy.num_generations to 2 or more"
            )


def _check_environment(config: Config) -> None:
    name, backend = config.environment.name, config.policy.generation.backend
    if name and not config.plugins and name not in ENVIRONMENTS:
        raise UserError(
            f"config key 'environment.name' is {name!r}: allowed is {', '.join(ENVIRONMENTS)}, or "
            "what a module that plugins names registers"
        )
    if config.reward.function == "environment" and not name:
        raise UserError("reward.function=environment is of dialogues: set environment.name")
    if name and backend not in KNOWN_BACKENDS:
        raise UserError(
            f"environment.name={name} samples dialogues, which policy.generation.backend="
            f"{backend} does not: use one of {', '.join(KNOWN_BACKENDS)}"
        )


def _check_batches(policy: Policy, distillation: Distillation) -> None:
    strategy = distillation.generate_strategy
    if policy.sequence_packing.enabled and policy.dynamic_batching.enabled:
        raise UserError(
            "policy.sequence_packing.enabled and policy.dynamic_batching.enabled both cut batches "
            "by tokens: packing leaves less padding, so switch the other off"
        )
    if not policy.cut_by_tokens and policy.train_global_batch_size % policy.train_micro_batch_size:
        divisors = _divisors(policy.train_global_batch_size)
        fitting = max(size for size in divisors if size <= policy.train_micro_batch_size)
        raise UserError(
            f"policy.train_global_batch_size={policy.train_global_batch_size} is not divisible by "
            f"policy.train_micro_batch_size={policy.train_micro_batch_size}: "
            f"try train_micro_batch_size={fitting}"
        )
    if policy.train_global_batch_size % strategy.num_generations:
        raise UserError(
            f"policy.train_global_batch_size={policy.train_global_batch_size} is not divisible by "
            f"distillation.generate_strategy.num_generations={strategy.num_generations}: make it "
            "a multiple"
        )
    if strategy.num_generations > 1 and distillation.lambda_ < 1:
        raise UserError(
            "distillation.generate_strategy.num_generations > 1 samples several responses to one "
            f"prompt, but with lambda_={distillation.lambda_} batches come from fixed data with "
            "one response each: use lambda_=1 or num_generations=1"
        )
    if distillation.mix == "both" and not (
        distillation.lambda_ == 0.5 and policy.train_global_batch_size % 2 == 0
    ):
        raise UserError(
            "distillation.mix=both makes half of every batch the student's responses and half the "
            f"data's, to the same prompts: set distillation.lambda_=0.5 (it is "
            f"{distillation.lambda_}) and an even policy.train_global_batch_size"
        )
    if distillation.kl_type_on_data and not 0 < distillation.lambda_ < 1:
        raise UserError(
            f"distillation.kl_type_on_data={distillation.kl_type_on_data} is for the data's "
            f"responses beside the student's own, and distillation.lambda_={distillation.lambda_} "
            "has one kind only: set kl_type, or a lambda_ between 0 and 1"
        )
    if distillation.hard_labels and distillation.lambda_ > 0:
        raise UserError(
            f"distillation.hard_labels trains on fixed data only, but lambda_="
            f"{distillation.lambda_}: set distillation.lambda_=0"
        )


def _check_lengths(config: Config) -> None:
    policy, strategy = config.policy, config.distillation.generate_strategy
    if strategy.max_length >= policy.max_total_sequence_length:
        raise UserError(
            f"distillation.generate_strategy.max_length={strategy.max_length} leaves no room for "
            f"a prompt in policy.max_total_sequence_length={policy.max_total_sequence_length}: "
            "lower the first or raise the second"
        )
    if config.evaluation.max_length > strategy.max_length:
        raise UserError(
            f"evaluation.max_length={config.evaluation.max_length} exceeds the room that prompts "
            f"leave, distillation.generate_strategy.max_length={strategy.max_length}: lower the "
            "first or raise the second"
        )
    if strategy.top_p <= 0:
        raise UserError("config key 'distillation.generate_strategy.top_p' must be above 0")


def _divisors(number: int) -> set[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return {*small, *(number // i for i in small)}


def _check_vllm(config: Config) -> None:
    sampler = config.policy.generation.vllm
    if config.policy.generation.backend == "vllm":
        if bool(sampler.urls) == bool(sampler.python):
            raise UserError(
                "policy.generation.backend=vllm takes either policy.generation.vllm.urls, servers "
                "that are running, or policy.generation.vllm.python, to start one here"
            )
        _check_servers("policy.generation.vllm", sampler)
        if any(re.match("--(api-key|hf-token)", argument) for argument in sampler.server_args):
            raise UserError(
                "config key 'policy.generation.vllm.server_args' holds a secret, which everybody "
                "on the machine could read: name an environment variable in api_key_variable "
                "instead, or leave it out, and a key is made up"
            )


def _check_servers(section: str, servers: VllmServers) -> None:
    for number, url in enumerate(servers.urls, start=1):
        parts = urllib.parse.urlsplit(url)
        plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            # Not shown: it may hold a password.
            raise UserError(
                f"config key '{section}.urls': number {number} is not plainly http://HOST:PORT or "
                "https://HOST:PORT; an API key belongs in the variable named by api_key_variable"
            )
    if len(set(servers.urls)) < len(servers.urls):
        raise UserError(f"config key '{section}.urls' names a server twice: name each once")
    if not re.fullmatch(r"(?!\d)\w*", servers.api_key_variable):
        # Not shown: somebody may have put the key itself here.
        raise UserError(
            f"config key '{section}.api_key_variable' is not the name of an environment variable: "
            "export the key in one, such as SERVER_KEY, and write SERVER_KEY here"
        )


def _check_teachers(config: Config) -> None:
    path, teachers = config.distillation.teacher_model_path, named_teachers(config)
    if config.teachers and (path or config.teacher != Teacher()):
        raise UserError(
            "both ways to name teachers at once: give each of several its teachers.NAME.model and "
            "other keys, and leave distillation.teacher_model_path and teacher.* at their defaults"
        )
    for name, teacher in teachers.items():
        _check_teacher(config, name, teacher)
    if len(decays := {each.ema_decay for each in teachers.values() if each.ema_decay}) > 1:
        raise UserError(
            f"teachers.*.ema_decay has {', '.join(map(str, sorted(decays)))}: the student has one "
            "moving average, so give all of its teachers the same decay"
        )


def _check_teacher(config: Config, name: str, teacher: OneTeacher) -> None:
    path, key = teacher_key(name, "model"), lambda key: teacher_key(name, key)
    if (teacher.model == "ema") != (teacher.ema_decay > 0) or teacher.ema_decay == 1:
        raise UserError(
            f"{key('ema_decay')}={teacher.ema_decay} with {path}={teacher.model!r}: "
            "a teacher that is the student's moving average (ema) needs a decay between 0 and 1, "
            "such as 0.99, and no other has one"
        )
    for rule in teacher.prompts:
        if not all(rule.partition("=")):
            raise UserError(
                f"{key('prompts')} has {rule!r}: write COLUMN=VALUE, such as subject=algebra"
            )
    if teacher.backend == "vllm":
        _check_server_teacher(config.distillation, name, teacher)
    _check_scores(config, name, teacher)
    _check_alignment(config, name, teacher)
    if teacher.model not in OF_STUDENT or not config.distillation.has_teacher:
        return
    for each, value, needed in (
        ("backend", teacher.backend, "local"),
        ("offload", teacher.offload, "none" if teacher.in_state else teacher.offload),
    ):
        if value != needed:
            raise UserError(
                f"{key(each)}={value} does not go with {path}={teacher.model}, "
                f"a teacher that is in the train state: set it to {needed}"
            )
    reads = teacher.system_prompt, teacher.prompt_template, teacher.template_arguments
    # Beside others, what the student was holds it back.
    alone = not name or teacher.model == "self"
    if alone and not any(reads) and not config.distillation.objective.terms:
        raise UserError(
            f"{path}={teacher.model} reads what the student reads and says the "
            f"same, so nothing would be learned: give it {key('prompt_template')}, "
            f"{key('system_prompt')} or {key('template_arguments')}, or name objective.terms"
        )


def _check_server_teacher(distillation: Distillation, name: str, teacher: OneTeacher) -> None:
    section = teacher_key(name, "vllm")
    if not teacher.vllm.urls:
        raise UserError(
            f"{teacher_key(name, 'backend')}=vllm needs {section}.urls, such as http://host:8000"
        )
    _check_servers(section, teacher.vllm)
    for key, needed, reason in (
        ("kl_temperature", 1.0, "the tail beyond its top_k tokens cannot be tempered"),
        ("hard_labels", False, "no teacher takes part in them"),
    ):
        if getattr(distillation, key) != needed:
            backend = teacher_key(name, "backend")
            raise UserError(
                f"distillation.{key}={getattr(distillation, key)} does not go with {backend}=vllm: "
                f"{reason}; set it to {needed}, or {backend}=local"
            )


def _check_scores(config: Config, name: str, teacher: OneTeacher) -> None:
    """Scores on disk are of fixed data, and of a teacher that stays what it was."""
    if not teacher.scores:
        return
    distillation, path = config.distillation, teacher_key(name, "model")
    stale = config.policy.generation.async_steps
    for key, value, wrong, reason in (
        ("distillation.lambda_", distillation.lambda_, distillation.lambda_ > 0, "of fixed data"),
        ("distillation.hard_labels", True, distillation.hard_labels, "of a teacher"),
        (path, teacher.model, teacher.in_state, "of a teacher that stays"),
        ("policy.generation.async_steps", stale, stale > 0, "of fixed data"),
    ):
        if wrong:
            raise UserError(
                f"{teacher_key(name, 'scores')}={teacher.scores} does not go with "
                f"{key}={value}, since scores on disk are {reason}: leave it empty, or change {key}"
            )


def _check_alignment(config: Config, name: str, teacher: OneTeacher) -> None:
    """A teacher with another tokenizer has its logits here, and reads one response."""
    if teacher.alignment == "none" or not config.distillation.has_teacher:
        return
    for key, value, wrong, reason in (
        ("backend", teacher.backend, teacher.backend == "vllm", "servers score the student's ids"),
        ("scores", teacher.scores, bool(teacher.scores), "scores on disk are of the student's ids"),
        ("model", teacher.model, teacher.model in OF_STUDENT, "it has the student's tokenizer"),
        (
            "prompt_template",
            teacher.prompt_template,
            "{feedback}" in teacher.prompt_template,
            "feedback is in the student's tokens",
        ),
    ):
        if wrong:
            raise UserError(
                f"{teacher_key(name, 'alignment')}={teacher.alignment} is for a local teacher with "
                f"another tokenizer and does not go with {teacher_key(name, key)}={value}: "
                f"{reason}; change it, or set alignment to none"
            )
    if config.environment.name:
        raise UserError(
            f"{teacher_key(name, 'alignment')}={teacher.alignment} aligns one response, and "
            f"environment.name={config.environment.name} samples dialogues: leave one of them out"
        )


def _check_lora(config: Config) -> None:
    lora = config.policy.lora
    if lora.rank and not lora.targets:
        raise UserError("config key 'policy.lora.targets' is empty: all-linear adapts every matrix")
    asked = {
        "policy.lora.base_dtype": lora.base_dtype == "int8",
        "checkpointing.export_format": config.checkpointing.export_format == "peft",
    }
    for key in (key for key, is_asked in asked.items() if is_asked and not lora.rank):
        raise UserError(
            f"{key} is about adapters, and policy.lora.rank=0 trains none: set a rank, or leave "
            f"{key} at its default"
        )


def _check_models(config: Config) -> None:
    paths = {"policy.model_name": config.policy.model_name}
    for name, teacher in all_teachers(config).items():
        if teacher.backend == "local":
            paths[teacher_key(name, "model")] = teacher.model
    for key, path in paths.items():
        if not path:
            raise UserError(
                f"config key '{key}' is empty: pass a folder with config.json and *.safetensors, "
                "a hub id or embedded:NAME"
            )
