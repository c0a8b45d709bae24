"""Tokenizers: agreement, ends, and those the project makes."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from distill.base.errors import UserError
from distill.data.arithmetic import CHARACTERS
from distill.data.tokenizer import (
    END_OF_TEXT,
    character_tokenizer,
    check_same_vocabulary,
    end_ids,
    load_tokenizer,
    save_tokenizer,
    shared_vocabulary,
    train_bpe_tokenizer,
    vocabulary_size,
)
from distill.models.checkpoints.hub import resolve_model


def test_character_tokenizer_round_trips_through_a_folder(tmp_path):
    tokenizer = character_tokenizer("0123456789+=\n")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "12+3=15\n15+1=16"
    ids = loaded(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and loaded.decode(ids) == text
    assert vocabulary_size(loaded) == 15
    assert loaded.eos_token_id != loaded.pad_token_id


def test_the_built_in_models_read_every_character():
    made = character_tokenizer(CHARACTERS)
    assert made("3+6\n").input_ids == [5, 12, 8, 16]
    for name in ("student", "teacher"):
        loaded = load_tokenizer(resolve_model(f"embedded:arithmetic-{name}"))
        for text in ("3+6\n", "12-3=9\n9*2=18", "3x 6"):
            assert loaded(text).input_ids == made(text).input_ids
        assert loaded("x").input_ids == [loaded.pad_token_id]  # unknown, but not lost


def digits_in_threes(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\P{N}+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def words_of_gpt2(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def lower_case(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


TEXT = "What is 123? It's \u2126 12345\n<|endoftext|> ok"


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "gemma"])
@pytest.mark.parametrize("change", [digits_in_threes, words_of_gpt2, lower_case])
def test_ids_are_those_of_the_folders_file(tmp_path, model_type, change):
    texts = ["What is 123 and 12345 and What is 123?"] * 30
    tokenizer = Tokenizer(models.BPE())
    words_of_gpt2(tokenizer)
    change(tokenizer)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # As the hub has it, the class of another pre-tokeniser, and flags that differ from the file's.
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {
            "300": {"content": "<|endoftext|>", "special": True, "lstrip": True, "rstrip": True}
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    exact = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    exact.no_truncation()
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXT).input_ids == exact.encode(TEXT).ids
    assert loaded.eos_token_id == exact.token_to_id("<|endoftext|>")
    saved = tmp_path / "saved"
    save_tokenizer(loaded, saved)
    assert load_tokenizer(saved)(TEXT).input_ids == exact.encode(TEXT).ids


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_made_tokenizers_are_the_same_whatever_loads_them(tmp_path, kind):
    texts = ["What is 123 and 12345, it's größer?"] * 30
    made = train_bpe_tokenizer(texts, 320) if kind == "bpe" else character_tokenizer(CHARACTERS)
    save_tokenizer(made, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    text = "What is 123? größer\n\n  12345" if kind == "bpe" else "12+3=15\n15+1=16"
    usual = AutoTokenizer.from_pretrained(str(tmp_path))
    assert load_tokenizer(tmp_path)(text).input_ids == usual(text).input_ids
    assert usual(text).input_ids == made(text).input_ids
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows


def test_folder_of_words_and_merges(tmp_path):
    words = {word: i for i, word in enumerate([END_OF_TEXT, *"1234567890", "12", "Ċ"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    assert load_tokenizer(tmp_path)("34\n").input_ids == [words["3"], words["4"], words["Ċ"]]


def test_bpe_round_trips_any_text():
    tokenizer = train_bpe_tokenizer(["the cat sat on the mat"] * 50, 300)
    text = "the cat, größer than 3 €\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("the cat", add_special_tokens=False).input_ids) < 7
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "hi\n"


def test_first_differing_token_is_named():
    check_same_vocabulary(character_tokenizer("abc"), character_tokenizer("abc"))
    with pytest.raises(UserError, match="'b', student id 3, teacher id 4"):
        check_same_vocabulary(character_tokenizer("abc"), character_tokenizer("acb"))
    with pytest.raises(UserError, match="'d', student absent, teacher id 5"):
        check_same_vocabulary(character_tokenizer("abc"), character_tokenizer("abcd"))


def test_ends_come_from_tokenizer_and_generation_config(tmp_path):
    tokenizer = character_tokenizer("ab")
    assert end_ids(tokenizer, tmp_path) == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    assert end_ids(tokenizer, tmp_path) == (1, 3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert end_ids(tokenizer, tmp_path) == (1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert end_ids(tokenizer, tmp_path) == (1, 2, 3)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}"
    assert end_ids(tokenizer, tmp_path) == (0, 1, 2, 3)
    for wrong in ("2", 2.5, [1, None], True):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError, match="config.json has eos_token_id .* must be an id or a"):
            end_ids(tokenizer, tmp_path)


def test_either_models_ends_are_those_of_both(tmp_path):
    for role, listed in (("student", [3]), ("teacher", [2, 3])):
        save_tokenizer(character_tokenizer("ab"), tmp_path / role)
        settings = json.dumps({"eos_token_id": listed})
        (tmp_path / role / "generation_config.json").write_text(settings)
    assert shared_vocabulary(tmp_path / "student", tmp_path / "teacher").end_ids == (1, 2, 3)
    (tmp_path / "teacher/config.json").write_text("{")
    with pytest.raises(UserError, match="teacher/config.json cannot be read as a JSON object"):
        shared_vocabulary(tmp_path / "student", tmp_path / "teacher")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert "holds no tokenizer" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="holds no tokenizer"):  # not an empty one
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_several_chat_templates(tmp_path):
    tokenizer = character_tokenizer("ab")
    tokenizer.chat_template = {"tools": "t", "default": "d"}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "d"
    assert load_tokenizer(tmp_path, "tools").chat_template == "t"
    assert load_tokenizer(tmp_path, "none").chat_template is None
    tokenizer.chat_template = {"tools": "t", "rag": "r"}
    tokenizer.save_pretrained(other := tmp_path / "other")
    with pytest.raises(UserError, match="data.chat_template=''.*are rag, tools; set the name"):
        load_tokenizer(other)
