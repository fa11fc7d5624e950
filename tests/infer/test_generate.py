"""Generation: with and without a cache, batches with padding, streams, beams, pipelines."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StaticCache, TextStreamer, pipeline

from bitmoe.infer import LowBitCache


@pytest.fixture(scope="module")
def model(configs, make_pair):
    return make_pair(configs["softmax experts in 2 groups"]).model


@pytest.fixture(scope="module")
def tokenizer():
    """A byte a token, as many as the model knows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:99]
    inner = Tokenizer(models.BPE(vocab={"<pad>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>", padding_side="left")


def greedy(model, ids, **kwargs):
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, **settings)


IDS = torch.tensor([[5, 17, 60, 3, 42]])


@pytest.mark.parametrize(
    "kwargs",
    [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["none", "static"],
)
def test_caches_agree(model, kwargs):
    assert torch.equal(greedy(model, IDS), greedy(model, IDS, **kwargs))


def test_greedy_is_the_argmax(model):
    ids = IDS
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(model, IDS), ids)


@pytest.mark.parametrize("kv_bits", [16, 4, 3])
def test_left_padded_batch(model, tokenizer, kv_bits):
    texts = ["def f(x):", "a", "import os and more"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False, kv_bits=kv_bits
    )
    for row, text in zip(together, texts, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=8, do_sample=False, kv_bits=kv_bits)
        assert torch.equal(row[-8:], alone[0, -8:])


@pytest.mark.parametrize("kv_bits", [16, 3])
def test_beams(model, kv_bits):
    """Beams change the order of rows in the cache."""
    beams = greedy(model, IDS.repeat(2, 1), num_beams=3, kv_bits=kv_bits)
    assert torch.equal(beams[0], beams[1])
    if kv_bits == 16:
        assert torch.equal(beams, greedy(model, IDS.repeat(2, 1), num_beams=3, use_cache=False))


def test_bits_of_config_and_of_call(configs, make_pair):
    model = make_pair(configs["a4.8"], kv_bits=3).model
    kept = {"return_dict_in_generate": True}
    assert isinstance(greedy(model, IDS, **kept).past_key_values, LowBitCache)
    assert greedy(model, IDS, **kept).past_key_values.layers[0].bits == 3
    assert greedy(model, IDS, kv_bits=4, **kept).past_key_values.layers[0].bits == 4
    assert not isinstance(greedy(model, IDS, kv_bits=16, **kept).past_key_values, LowBitCache)
    assert isinstance(model(IDS, use_cache=True).past_key_values, LowBitCache)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert isinstance(greedy(model, IDS, **static, **kept).past_key_values, StaticCache)


def test_speculation_takes_tokens_back(model):
    """Prompt lookup crops the cache when guesses fail."""
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    guessed = greedy(model, ids, prompt_lookup_num_tokens=3, kv_bits=4)
    assert torch.equal(guessed, greedy(model, ids, kv_bits=4))


def test_stream_and_pipeline(model, tokenizer, capsys):
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "def f", max_new_tokens=8, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    capsys.readouterr()
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    greedy(model, ids, max_new_tokens=8, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == written
    assert written
