"""Writing of one token file pair and its sidecar, through megatron-core's ``IndexedDatasetBuilder``.

The builder casts silently and does not sync; the writer refuses ids that do not fit and leaves the syncing to
``new_folder``, in which it writes.
"""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np

from bitmoe.config.errors import InputError
from bitmoe.data.token_files import path_of
from bitmoe.data.tokenizer import Tokenizer

# Megatron's own limit (DType.optimal_dtype), a little below 2^16.
UINT16_VOCABULARY = 65500


class TokenWriter:
    """Collects documents of one split into ``<prefix>.bin`` and ``.idx``.

    Args:
        prefix: where to write; the folder exists.
        tokenizer: gives the end-of-document token and the vocabulary.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer):
        with warnings.catch_warnings():
            # Importing megatron.core names every optional accelerator that is missing; none matters here.
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        self._prefix, self._tokenizer = prefix, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size < UINT16_VOCABULARY else np.int32
        self._builder = IndexedDatasetBuilder(str(path_of(prefix, ".bin")), dtype=self.dtype)
        self.documents = self.tokens = self.text_bytes = self._max_id = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document and the end-of-document token.

        Args:
            ids: int64 [tokens].
            text_bytes: size of the document in UTF-8, for the statistics.

        Raises:
            InputError: an id outside the tokenizer's vocabulary.
        """
        import torch

        ids = np.append(ids, self._tokenizer.eod_id)
        low, high = int(ids.min()), int(ids.max())
        vocab_size = self._tokenizer.vocab_size
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"the tokenizer returned id {wrong}, outside its vocabulary of {vocab_size}",
                fix="check the tokenizer file",
                key="tokenizer.path",
            )
        self._builder.add_document(torch.from_numpy(ids), [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._max_id = max(self._max_id, high)

    def close(self, source: dict[str, object]) -> None:
        """Write the index and the sidecar.

        Args:
            source: identity of the text, kept in the sidecar for people.
        """
        bin_path = path_of(self._prefix, ".bin")
        self._builder.finalize(str(path_of(self._prefix, ".idx")))
        with open(bin_path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        sidecar = {
            "tokenizer": self._tokenizer.fingerprint,
            "vocab_size": self._tokenizer.vocab_size,
            "max_id": self._max_id,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "bin_bytes": bin_path.stat().st_size,
            "sha256": sha256,
            "source": source,
        }
        sidecar_path = path_of(self._prefix, ".tokens.json")
        sidecar_path.write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
