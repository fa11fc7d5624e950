"""A tokenizer as GGUF metadata: what llama.cpp calls ``gpt2``, a byte-level BPE.

llama.cpp has the pre-tokenizers built in and knows them by name, so only a ``tokenizer.json`` whose rules are one of
those can be written; any other is refused, because it would load and split text differently. The source is what
transformers gets (``tokenizer_files.py``), so ids and special tokens are the same in both.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType

from bitmoe.config.errors import InputError
from bitmoe.convert.tokenizer_files import SpecialIds, special_ids, write_tokenizer_files
from bitmoe.data.tokenizer import JSON_FILE, Tokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class GgufVocabulary:
    """Tokens by id, merges by rank, and the ids with a meaning."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre_tokenizer: str
    special: SpecialIds

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it as metadata; prompts get no beginning-of-text token, since training gives documents none."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.special.eos)
        writer.add_eos_token_id(self.special.eos)
        writer.add_pad_token_id(self.special.pad)
        writer.add_add_bos_token(False)


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """The vocabulary of a model; rows of its embedding without a token get unused ones.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the embedding as exported.

    Raises:
        InputError: more tokens than rows, or a tokenizer that llama.cpp does not have.
    """
    if tokenizer.vocab_size > vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}"
        raise InputError(what, fix="use the tokenizer the model was trained with")
    content, ids = _tokenizer_json(tokenizer), special_ids(tokenizer)
    texts = [f"<|unused_{number}|>" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for text, number in content["model"]["vocab"].items():
        texts[number], types[number] = text, TokenType.NORMAL
    for added in content["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    # Older files hold "a b", newer ones ["a", "b"].
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return GgufVocabulary(
        tokens=texts,
        types=types,
        # llama.cpp wants merges and GGUF has no empty lists: this pair never meets in a text.
        merges=merges or [f"{texts[ids.eos]} {texts[ids.eos]}"],
        pre_tokenizer=_pre_tokenizer(content),
        special=ids,
    )


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(tokenizer, Path(folder), context=1)
        return json.loads((Path(folder) / JSON_FILE).read_text(encoding="utf-8"))


def _pre_tokenizer(content: dict) -> str:
    """The name llama.cpp knows a ``tokenizer.json``'s rules by."""
    model = content["model"]
    if model["type"] != "BPE" or content["normalizer"] is not None:
        reason = "it is no byte-level BPE without a normalizer"
    elif any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")):
        reason = "its BPE is not byte-level"
    elif name := _known_rules(content["pre_tokenizer"], model):
        return name
    else:
        reason = "its pre_tokenizer is neither GPT-2's nor Llama 3's"
    raise InputError(f"llama.cpp cannot split text as tokenizer.json does: {reason}", fix="convert to=bitmoe or to=hf")


def _known_rules(rules: dict | None, model: dict) -> str | None:
    steps, ignore_merges = (rules or {}).get("pretokenizers", [rules]), bool(model.get("ignore_merges"))
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    # Where there is nothing to merge, any way of splitting gives the same tokens.
    if len(steps) == 1 and (last["use_regex"] or not model["merges"]) and not ignore_merges:
        return "gpt-2"
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    return "llama-bpe" if steps[:-1] == [split] and not last["use_regex"] and ignore_merges else None
