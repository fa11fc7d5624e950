"""What AutoTokenizer makes of a text is what training saw."""

import json
import random

import pytest
from transformers import AutoTokenizer

from bitmoe.convert.tokenizer_files import write_tokenizer_files
from bitmoe.data.bpe import train_bpe
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer

ODD = "<|endoftext|> a <|bos|> <|pad|>  x\n\n\t \xe9 \u65e5\u672c \U0001f642\u200d\U0001f469 \x00\x7f\x80 don't  it's"


def with_rules_of_its_own():
    """A tokenizer.json that adds a token in front, cuts and pads; training does none of it."""
    content = json.loads(train_bpe(["some text of words, don't you see <|endoftext|> " * 20], 300))
    front = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return JsonTokenizer(json.dumps(content))


@pytest.fixture(params=["byte", "bpe"])
def pair(request, tmp_path):
    """A tokenizer of training and the one that transformers loads."""
    ours = ByteTokenizer() if request.param == "byte" else with_rules_of_its_own()
    write_tokenizer_files(ours, tmp_path, context=64)
    return ours, AutoTokenizer.from_pretrained(tmp_path)


def random_texts(number):
    rng = random.Random(5)
    planes = [range(128), range(0xD800), range(0xE000, 0x110000)]
    for _ in range(number):
        yield "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randrange(60)))


def test_ids_are_those_of_training(pair):
    ours, theirs = pair
    for text in ["", ODD, *random_texts(200)]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_any_ids_decode_alike(pair):
    ours, theirs = pair
    rng = random.Random(6)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size) for _ in range(30)]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens_are_set(pair, tmp_path):
    ours, theirs = pair
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod_id, ours.eod_id)
    assert theirs.pad_token_id == (258 if isinstance(ours, ByteTokenizer) else ours.eod_id)
    assert (theirs.padding_side, theirs.model_max_length, len(theirs)) == ("left", 64, ours.vocab_size)
    batch = theirs(["a", "abc"], padding=True)
    assert [sum(mask) for mask in batch["attention_mask"]] == [len(ours.encode(text)) for text in ("a", "abc")]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == ours.eod_id
