"""The tokenizer files of transformers, for a tokenizer of training.

``AutoTokenizer`` must give the ids that training saw: no token in front or behind, and special tokens that are
spelled out in a text are text. So a ``tokenizer.json`` loses its post-processor, and ``tokenizer_config.json`` says
``split_special_tokens``. The byte tokenizer becomes a BPE of 256 bytes that has nothing to merge.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer

from bitmoe.data.tokenizer import JSON_FILE, ByteTokenizer, Tokenizer

EOD_TOKEN, BOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|bos|>", "<|pad|>"


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning; a document begins where the one before it has ended."""

    eos: int
    pad: int

    def as_keys(self) -> dict[str, int]:
        """As the configs of transformers name them."""
        return {"bos_token_id": self.eos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The special tokens a model is used with."""
    pad = tokenizer.pad_id if isinstance(tokenizer, ByteTokenizer) else tokenizer.eod_id
    return SpecialIds(eos=tokenizer.eod_id, pad=pad)


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.

    Args:
        tokenizer: of the model.
        folder: where to.
        context: tokens of the longest text the model was trained on.
    """
    content = _byte_level_json() if isinstance(tokenizer, ByteTokenizer) else _as_trained(tokenizer)
    ids, text_of = special_ids(tokenizer), TokenizersTokenizer.from_str(json.dumps(content)).id_to_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text_of(ids.eos),
        "eos_token": text_of(ids.eos),
        "pad_token": text_of(ids.pad),
        "model_max_length": context,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / JSON_FILE, content)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", ids.as_keys())


def write_json(path: Path, content: object) -> None:
    """Write JSON as text that is the same wherever it is made."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n", encoding="utf-8")


def _byte_level_json() -> dict:
    """A ``tokenizer.json`` with the ids of ``ByteTokenizer``."""
    built = TokenizersTokenizer(
        models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[])
    )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    # In the order of their ids, which follow the bytes'.
    built.add_special_tokens([AddedToken(text, special=True) for text in (EOD_TOKEN, BOS_TOKEN, PAD_TOKEN)])
    return json.loads(built.to_str())


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers, GPT-2's way."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _as_trained(tokenizer: Tokenizer) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        content = json.loads((Path(folder) / JSON_FILE).read_text(encoding="utf-8"))
    # What training switches off: tokens added around a text, texts cut short or filled up.
    return content | {"post_processor": None, "truncation": None, "padding": None}
