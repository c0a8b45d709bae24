"""Writes a model of random weights, where a recipe for toy models begins.

    python -m distill.scratch --config=configs/sft.py:arithmetic_student \
        --tokenizer=characters:arithmetic --layers=3 --width=48 --heads=3 --kv_heads=3

The folder is policy.model_name of the config unless --output names another; a tokenizer is learned
from the config's data. Trained with distillation.hard_labels=True, it becomes a toy teacher or
student.
"""

from absl import flags

from distill.base.files import local_path
from distill.config import cli
from distill.config.parse import parse_config


def run() -> None:
    config_flag = cli.define_config_flag()
    output = flags.DEFINE_string("output", None, "Folder to write; default: policy.model_name.")
    tokenizer = flags.DEFINE_string(
        "tokenizer", None, "characters:arithmetic, bpe:SIZE, or that of a folder or hub id."
    )
    layers = flags.DEFINE_integer("layers", 2, "Decoder layers.", lower_bound=1)
    width = flags.DEFINE_integer("width", 64, "Width of the residual stream.", lower_bound=1)
    heads = flags.DEFINE_integer("heads", 4, "Query heads.", lower_bound=1)
    kv_heads = flags.DEFINE_integer("kv_heads", 2, "Key and value heads.", lower_bound=1)
    like = flags.DEFINE_string(
        "like", None, "A config.json of any family that gives these four sizes and all others."
    )
    rows = flags.DEFINE_integer("vocab_size", 0, "Embedding rows; 0: the tokenizer's ids.")
    seed = flags.DEFINE_integer("seed", 0, "Of the weights.", lower_bound=0)

    def main() -> None:
        config = parse_config(cli.required_config(config_flag))
        if not tokenizer.value:
            raise cli.UserError("pass --tokenizer, such as bpe:2048 or characters:arithmetic")
        # Imported late: a wrong flag should not wait for JAX.
        from distill.build import scratch
        from distill.build.data import build_dataset
        from distill.build.plugins import import_plugins
        from distill.models.checkpoints.hub import EMBEDDED, is_hub_id

        import_plugins(config)
        named = config.policy.model_name
        if not output.value and (named.startswith(EMBEDDED) or is_hub_id(named)):
            raise cli.UserError(
                f"policy.model_name={named} is no folder, or may be a model of the hub, in whose "
                "place random weights would be found: pass --output=FOLDER"
            )
        folder = local_path(output.value or named)
        made = scratch.make_tokenizer(tokenizer.value, build_dataset(config))
        options = dict(vocab_size=rows.value, seed=seed.value)
        if like.value:
            scratch.make_random_model_like(folder, made, local_path(like.value), **options)
        else:
            scratch.make_random_model(
                folder,
                made,
                num_layers=layers.value,
                model_width=width.value,
                num_heads=heads.value,
                num_kv_heads=kv_heads.value,
                max_positions=config.policy.max_total_sequence_length,
                **options,
            )
        print(f"random weights: {folder}")

    cli.run(main)


if __name__ == "__main__":
    run()
