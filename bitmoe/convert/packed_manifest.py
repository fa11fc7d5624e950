"""``manifest.json`` of a packed model: size and SHA-256 of every file, and SHA-256 of every tensor under its name.

It finds damage (a flipped bit, a truncated or missing file) and mix-ups (an expert under another's name, also where
somebody wrote the file again). It is no signature: nothing in the folder can hold code, so none is needed to read it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from bitmoe.config.errors import InputError
from bitmoe.convert.tokenizer_files import write_json
from bitmoe.train.safetensors_shards import Shards

MANIFEST = "manifest.json"
_FORMAT = "bitmoe packed 1"
# What a reader could take for a part of the model; a model card that a user puts there, for instance, is no concern.
_READ_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".py", ".json")


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes, row-major."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def write_packed_manifest(folder: Path, tensors: dict[str, str]) -> None:
    """Write the manifest of a complete folder.

    Args:
        folder: holds all other files.
        tensors: ``tensor_digest`` of each tensor.
    """
    files = {path.name: _file_record(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    body = {"format": _FORMAT, "files": files, "tensors": dict(sorted(tensors.items()))}
    write_json(folder / MANIFEST, {**body, "checksum": _checksum(body)})


def verify_packed(folder: Path) -> None:
    """Check that a packed model is whole.

    Raises:
        InputError: it is not; names the file or the tensor.
    """
    body = _read_manifest(folder)
    files, tensors = body["files"], body["tensors"]
    present = set(os.listdir(folder))
    strange = {name for name in present - set(files) - {MANIFEST} if name.endswith(_READ_SUFFIXES)}
    for problem, names in (("missing", set(files) - present), ("not part of it", strange)):
        if names:
            raise _damaged(folder, f"{problem}: {', '.join(sorted(names))}")
    for name, record in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise _damaged(folder, f"{name} is no regular file")
        if path.stat().st_size != record["bytes"]:
            raise _damaged(folder, f"{name} has {path.stat().st_size} bytes, {record['bytes']} were written")
        if _file_record(path) != record:
            raise _damaged(folder, f"{name} was changed after it was written")
    shards = Shards(folder)
    for name in sorted(shards.stored.keys() | tensors.keys()):
        if name not in shards.stored or tensor_digest(shards.read(name)) != tensors.get(name):
            raise _damaged(folder, f"{name} is not the tensor that was written")


def verify_if_packed(folder: Path) -> None:
    """``verify_packed`` of a model in the packed format; others bring no manifest.

    Raises:
        InputError: a packed model that is damaged, or has lost its manifest.
    """
    try:
        model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: config.json cannot be read ({error})", fix="convert or copy it again") from error
    if model_type == "bitmoe":
        verify_packed(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        checksum = body.pop("checksum", None)
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if checksum != _checksum(body):
        raise _damaged(folder, f"{MANIFEST} was changed after it was written")
    if body["format"] != _FORMAT:
        raise InputError(f"{folder} has the format {body['format']!r}, this version reads {_FORMAT!r}")
    return body


def _file_record(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, problem: str) -> InputError:
    return InputError(f"packed model {folder}: {problem}", fix="convert or copy it again")
