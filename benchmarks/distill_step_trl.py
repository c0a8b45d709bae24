"""TRL's side of benchmarks/distill_step.py; its interpreter has TRL and not this project.

    PYTHON benchmarks/distill_step_trl.py FOLDER SETTINGS

FOLDER holds `student`, `teacher` and work.json; SETTINGS is a JSON object. Runs `trainer.train()`,
one step for each line on standard input, and answers with the step's loss on standard output.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class OnRequest(TrainerCallback):
    """Holds each step back until it is asked for, and answers when it is over."""

    def __init__(self, answers):
        self._answers = answers

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more; there is nothing to save

    def on_log(self, args, state, control, logs=None, **kwargs):
        print(logs["loss"], file=self._answers, flush=True)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word is the number of its token. No model can sample the end: its number is too large."""
    words = {str(i): i for i in range(vocab_size)} | {"<end>": vocab_size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="0",
        chat_template=template,
        padding_side="left",
    )


def make_trainer(folder: Path, work: dict, settings: dict, callback: TrainerCallback):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
        for role in ("student", "teacher")
    )
    _check_lengths(student, work["response_length"])
    prompts = [" ".join(map(str, prompt)) for prompt in work["prompts"]]
    shared = dict(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        max_steps=1_000_000,
        per_device_train_batch_size=len(prompts),
        learning_rate=work["learning_rate"],
        weight_decay=work["weight_decay"],
        lr_scheduler_type="constant",
        bf16=settings["bf16"],
        use_cpu=True,
        temperature=1.0,
        beta=work["beta"],
        gradient_checkpointing=settings["checkpointing"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if settings["trainer"] == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        config = DistillationConfig(max_completion_length=work["response_length"], **shared)
        trainer, rows = DistillationTrainer, [{"prompt": prompt} for prompt in prompts]
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        config = GKDConfig(lmbda=1.0, max_new_tokens=work["response_length"], **shared)
        answer = " ".join(["1"] * work["response_length"])
        trainer, rows = GKDTrainer, [{"messages": _chat(prompt, answer)} for prompt in prompts]
    return trainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(student.config.vocab_size),
        callbacks=[callback],
        peft_config=_adapters(**settings["lora"]) if "lora" in settings else None,
    )


def _adapters(rank: int, alpha: float):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _chat(prompt: str, answer: str) -> list[dict[str, str]]:
    """GKD wants an answer; with lmbda=1 it only divides the loss by the number of its tokens."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _check_lengths(model, response_length: int) -> None:
    """Stops the run when answers have another length than was asked for."""
    generate = model.generate

    def checked_generate(*args, **kwargs):
        answers = generate(*args, **kwargs)
        tokens = getattr(answers, "sequences", answers)
        sampled = tokens.shape[1] - kwargs["input_ids"].shape[1]
        if sampled != response_length:
            raise RuntimeError(f"{sampled} tokens were sampled instead of {response_length}")
        return answers

    model.generate = checked_generate


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work = json.loads((folder / "work.json").read_text())
    make_trainer(folder, work, settings, OnRequest(answers)).train()


if __name__ == "__main__":
    main()
