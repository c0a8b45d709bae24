"""Tokenizers: agreement, ends, and those the project makes."""

import json

import pytest

from distill.base.errors import UserError
from distill.data.tokenizer import (
    character_tokenizer,
    check_same_vocabulary,
    end_ids,
    load_tokenizer,
    train_bpe_tokenizer,
    vocabulary_size,
)


def test_character_tokenizer_round_trips_through_a_folder(tmp_path):
    tokenizer = character_tokenizer("0123456789+=\n")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "12+3=15\n15+1=16"
    ids = loaded(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and loaded.decode(ids) == text
    assert vocabulary_size(loaded) == 15
    assert loaded.eos_token_id != loaded.pad_token_id


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


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)
