"""EasyDeL's side of benchmarks/distill_step.py; its interpreter has EasyDeL and not this project.

    PYTHON benchmarks/distill_step_easydel.py FOLDER SETTINGS

As benchmarks/distill_step_trl.py, whose tokenizer it takes. What equal work needs: its total batch
size counts sequences of one of the accumulated microbatches; prompts are padded on the left, to the
longest; no model can sample the tokenizer's end, and the models have none. Its losses weigh the
positions of the sampled tokens, not those before them: as many, one later.
"""

import json
import os
import sys
from pathlib import Path

import easydel as ed
import numpy as np
from datasets import Dataset
from distill_step_trl import make_tokenizer
from jax import numpy as jnp

GIVEN = 1  # all tokens of the responses that sampled ones replace
TRAINERS = {
    "GKDTrainer": (ed.GKDTrainer, ed.GKDConfig),
    "OnPolicyDistillationTrainer": (
        ed.OnPolicyDistillationTrainer,
        ed.OnPolicyDistillationConfig,
    ),
}


def load_model(folder: Path, settings: dict):
    config = {
        key: settings[key] for key in ("attn_mechanism", "decode_attn_mechanism") if key in settings
    }
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(folder),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        config_kwargs=ed.EasyDeLBaseConfigDict(**config),
        from_torch=True,
        verbose=False,
    )


def make_dataset(work: dict) -> Dataset:
    """Prompts padded on the left, and responses, which GKD wants and replaces by sampled ones."""
    longest, response = max(map(len, work["prompts"])), work["response_length"]
    rows = []
    for prompt in work["prompts"]:
        padding = [0] * (longest - len(prompt))
        prompt_mask = padding + [1] * len(prompt)
        rows.append(
            {
                "prompt_input_ids": padding + prompt,
                "prompt_attention_mask": prompt_mask,
                "input_ids": padding + prompt + [GIVEN] * response,
                "attention_mask": prompt_mask + [1] * response,
                "completion_mask": [0] * longest + [1] * response,
            }
        )
    return Dataset.from_list(rows)


def make_prompts(work: dict) -> Dataset:
    """Which OnPolicyDistillationTrainer pads by itself."""
    return Dataset.from_list(
        [{"input_ids": p, "attention_mask": [1] * len(p)} for p in work["prompts"]]
    )


def make_trainer(folder: Path, work: dict, settings: dict, answers):
    student, teacher = (load_model(folder / role, settings) for role in ("student", "teacher"))
    student.generation_config.eos_token_id = student.config.vocab_size  # it wants one
    longest, response = max(map(len, work["prompts"])), work["response_length"]
    base, make_config = TRAINERS[settings["trainer"]]

    class OnRequest(base):
        """Holds each step back until it is asked for, and answers when it is over."""

        def on_step_start(self, state, step):
            if not sys.stdin.readline():
                os._exit(0)  # nobody asks any more; there is nothing to save
            return super().on_step_start(state, step)

        def _preprocess_batch_input(self, state, batch, is_train):
            batch, infos = super()._preprocess_batch_input(state, batch, is_train)
            sampled = int(np.asarray(batch["completion_mask"]).sum(axis=1).max())
            if sampled != response:
                raise RuntimeError(f"{sampled} tokens were sampled instead of {response}")
            if (np.asarray(batch["input_ids"])[:, -response:] == GIVEN).all():
                raise RuntimeError("nothing was sampled")  # GKD goes on then with what it was given
            return batch, infos

        def on_step_end(self, state, metrics, step):
            print(float(metrics.loss), file=answers, flush=True)
            return super().on_step_end(state, metrics, step)

    shared = dict(
        save_directory=str(folder / f"easydel-{os.getpid()}"),
        num_train_epochs=1_000_000,
        total_batch_size=len(work["prompts"]) // settings["microbatches"],
        gradient_accumulation_steps=settings["microbatches"],
        learning_rate=work["learning_rate"],
        weight_decay=work["weight_decay"],
        shuffle_train_dataset=False,
        use_wandb=False,
        do_last_save=False,
        resume_if_possible=False,
        progress_bar_type="json",
        use_esurge_generation=False,
        temperature=1.0,
    )
    models = dict(teacher_model=teacher, processing_class=make_tokenizer(student.config.vocab_size))
    if settings["trainer"] == "GKDTrainer":
        config = make_config(
            lmbda=1.0,
            beta=work["beta"],
            max_new_tokens=response,
            max_length=longest + response,
            **shared,
        )
        return OnRequest(
            arguments=config, model=student, train_dataset=make_dataset(work), **models
        )
    config = make_config(
        alpha=1.0,
        max_prompt_length=longest,
        max_completion_length=response,
        temperature_sampling=1.0,
        top_k=0,
        top_p=1.0,
        **shared,
    )
    return OnRequest(
        arguments=config, student_model=student, train_dataset=make_prompts(work), **models
    )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    work = json.loads((folder / "work.json").read_text())
    make_trainer(folder, work, settings, answers).train()


if __name__ == "__main__":
    main()
