"""llama.cpp computes what the training forward computes, and splits text as the tokenizer does.

A small model of each kind that llama.cpp can express is trained for half a minute, because next tokens of a random one
are a matter of chance, and written as GGUF. llama.cpp runs in the Python that ``LLAMA_CPP`` names: one with the package
llama-cpp-python, which builds llama.cpp from its own source (``pip install llama-cpp-python``, some minutes).
"""

import argparse
import inspect
import json
import os
import subprocess

import numpy as np
import pytest
import torch

from bitmoe.convert.gguf_format import write_gguf
from bitmoe.convert.gguf_tokenizer import LLAMA3_PATTERN
from bitmoe.data.bpe import train_bpe
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer
from bitmoe.testing.reference_model import ReferenceModel

pytestmark = pytest.mark.skipif(
    "LLAMA_CPP" not in os.environ, reason="LLAMA_CPP is not set: the path of a Python that can import llama_cpp"
)

TEXT = inspect.getsource(argparse)
STEPS, BATCH, LENGTH = 150, 8, 128
LOGITS = """
import sys, llama_cpp, numpy
model, tokens, logits = sys.argv[1:]
rows = numpy.load(tokens)
llama = llama_cpp.Llama(model, n_ctx=rows.shape[1], n_threads=1, logits_all=True, verbose=False)
found = []
for row in rows:
    llama.reset()
    llama.eval(row.tolist())
    found.append(llama.scores[: len(row)].copy())
numpy.save(logits, numpy.stack(found))
"""
TOKENS = """
import json, sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps(llama.tokenize(sys.stdin.buffer.read(), add_bos=True, special=False)))
"""
LLAMA3_RULES = [
    {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]


def in_llama_cpp(script, *arguments, text=""):
    """Standard output of a script in the Python that has llama.cpp."""
    command = [os.environ["LLAMA_CPP"], "-c", script, *arguments]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def train(source):
    """Fit the model to text in plain torch; return rows it has not seen, [B, S]."""
    ids = torch.from_numpy(ByteTokenizer().encode(TEXT))
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    held_out, seen = rows[::10], rows[torch.arange(len(rows)) % 10 != 0]
    weights = [tensor.requires_grad_() for tensor in source.weights.values()]
    reference, optimizer = ReferenceModel(source.config, source.weights), torch.optim.Adam(weights, lr=2e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        batch = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        loss = reference.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return held_out[:BATCH, :-1]


def test_same_next_tokens(gguf_model, tmp_path):
    tokens_BS = train(gguf_model)
    np.save(tmp_path / "tokens.npy", tokens_BS.numpy())
    with torch.no_grad():
        logits_BSV = ReferenceModel(gguf_model.config, gguf_model.weights).logits(tokens_BS)
    expected = logits_BSV[..., : gguf_model.config.model.vocab_size].log_softmax(-1)
    # So sharp that another function could not agree by chance.
    assert expected.amax(-1).mean() > -1.5
    for type_name in ("tq1_0", "tq2_0"):
        file, logits_file = tmp_path / f"{type_name}.gguf", tmp_path / f"{type_name}.npy"
        write_gguf(gguf_model, file, type_name, ByteTokenizer())
        in_llama_cpp(LOGITS, file, tmp_path / "tokens.npy", logits_file)
        found = torch.from_numpy(np.load(logits_file)).log_softmax(-1)
        agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        print(f"{type_name}: top-1 {agreement:.2%}, mean KL {divergence:.2e}")
        assert agreement >= 0.99
        assert divergence <= 1e-3


@pytest.mark.parametrize("rules", ["bytes", "gpt-2", "llama-3"])
def test_same_tokens(dense_model, tmp_path, rules):
    text = TEXT[:3000] + " don't WE'LL 12345 caf\u00e9 \u4f60\u597d \U0001f600\t\n\n  end  "
    content = json.loads(train_bpe([TEXT], 600))
    if rules == "llama-3":
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": LLAMA3_RULES}
        content["model"]["ignore_merges"] = True
    tokenizer = ByteTokenizer() if rules == "bytes" else JsonTokenizer(json.dumps(content))
    write_gguf(dense_model("model.vocab_size=600"), tmp_path / "model.gguf", "tq2_0", tokenizer)
    found = json.loads(in_llama_cpp(TOKENS, tmp_path / "model.gguf", text=text))
    assert found == tokenizer.encode(text).tolist()
