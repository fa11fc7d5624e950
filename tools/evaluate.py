"""Evaluate an exported model with lm-eval on local text: nothing is downloaded.

Two tasks are made of the documents: ``held_out`` (how many bits the model needs for a byte of them) and ``next_line``
(which of four lines comes next; the other three stand elsewhere in the text). Without ``--text`` the documents are
those that the run (``--run``) held out. ``--kv-bits`` repeats it with low-bit caches, side by side::

    python tools/evaluate.py runs/default/packed --run runs/default --kv-bits 16 4 3
"""

import argparse
import logging
import random
import sys
from pathlib import Path

import datasets
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmoe.infer  # noqa: F401 (teaches transformers the packed format)
from bitmoe.config.errors import InputError
from bitmoe.config.from_dict import config_from_dict
from bitmoe.data.prepare import prepare
from bitmoe.data.token_files import open_token_file

CHOICES = 4
CONTEXT_LINES = 4
# Of each document, from its beginning: a minute or two in all on a laptop.
DOCUMENT_CHARACTERS = 4000
SEED = 1234


def main() -> int:
    """Evaluate and print a table; 2 where the input is no good."""
    arguments = _arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        documents = _read(arguments.text) if arguments.text else _held_out(arguments.run)
        documents = [document[:DOCUMENT_CHARACTERS] for document in documents[: arguments.documents]]
        results = {bits: _evaluate(arguments.model, bits, documents) for bits in arguments.kv_bits}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'KV bits':>8} {'bits/byte':>10} {'next line':>10}   ({len(documents)} documents)")
    for bits, (bits_per_byte, accuracy) in results.items():
        print(f"{bits:>8} {bits_per_byte:>10.4f} {accuracy:>10.1%}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder that bitmoe convert to=bitmoe wrote")
    parser.add_argument("--text", nargs="+", type=Path, help="text files, one document each")
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="take the text this run held out")
    parser.add_argument("--kv-bits", nargs="+", type=int, default=[16], help="bits of cached keys and values")
    parser.add_argument("--documents", type=int, default=16, help="at most so many documents")
    return parser.parse_args()


def _read(paths: list[Path]) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read text ({error})", fix="give UTF-8 text files") from error


def _held_out(run: Path) -> list[str]:
    """The documents that a run held out, as text."""
    try:
        saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{run} is no run ({error.strerror})", fix="give --run RUN or --text FILE") from error
    data = prepare(config_from_dict(saved))
    documents = []
    for part in data.parts:
        tokens = open_token_file(part.eval.prefix).tokens[part.eval.start : part.eval.stop]
        ends = [i for i, token in enumerate(tokens) if token == data.tokenizer.eod_id]
        starts = [0, *(end + 1 for end in ends)]
        documents += [data.tokenizer.decode(tokens[a:b]) for a, b in zip(starts, [*ends, len(tokens)], strict=True)]
    return [document for document in documents if document.strip()]


def _evaluate(folder: Path, kv_bits: int, documents: list[str]) -> tuple[float, float]:
    """Bits per byte, and share of next lines found."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, kv_bits=kv_bits, dtype="auto", local_files_only=True)
    length = model.config.max_position_embeddings
    results = simple_evaluate(
        HFLM(model, tokenizer=tokenizer, max_length=length, batch_size=8), tasks=_tasks(documents), bootstrap_iters=0
    )["results"]
    return results["held_out"]["bits_per_byte,none"], results["next_line"]["acc,none"]


def _tasks(documents: list[str]) -> list[dict]:
    texts = [{"text": document} for document in documents]
    return [
        {
            "task": "held_out",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(texts)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            "task": "next_line",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(_questions(documents))},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
    ]


def _questions(documents: list[str]) -> list[dict]:
    """For each document some lines, and four candidates for the next, one of which is right."""
    draw = random.Random(SEED)
    lines = [[line for line in document.splitlines() if line.strip()] for document in documents]
    everything = sorted({line for document in lines for line in document})
    questions = []
    for document in lines:
        for at in range(CONTEXT_LINES, len(document), 4 * CONTEXT_LINES):
            others = draw.sample([line for line in everything if line != document[at]], CHOICES - 1)
            answer = draw.randrange(CHOICES)
            context = "\n".join(document[at - CONTEXT_LINES : at]) + "\n"
            choices = [*others[:answer], document[at], *others[answer:]]
            questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


if __name__ == "__main__":
    sys.exit(main())
