"""``bitmoe convert``: open the source, refuse what the target cannot hold, write, check, give the folder its name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitmoe.config.choices import Precision
from bitmoe.config.convert_schema import ConvertConfig, GgufType, HfWeights, Packing, Target
from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import refusals
from bitmoe.convert.check_export import check_export, check_weights
from bitmoe.convert.check_text import check_tokens
from bitmoe.convert.compressed_format import write_compressed
from bitmoe.convert.gguf_format import write_gguf
from bitmoe.convert.hf_config import CONFIG_FILE
from bitmoe.convert.hf_export import write_hf
from bitmoe.convert.hf_import import HFBitNetWeights
from bitmoe.convert.output_folder import output_folder
from bitmoe.convert.packed_format import packed_bytes, write_packed
from bitmoe.convert.packed_manifest import verify_packed, write_packed_manifest
from bitmoe.convert.progress import ConvertProgress
from bitmoe.convert.tokenizer_files import special_ids, write_json, write_tokenizer_files
from bitmoe.convert.written_exports import CompressedExport, GgufExport, HfExport, PackedExport, WrittenExport
from bitmoe.model.export_names import export_shapes
from bitmoe.quant.bit_schedule import stage_at, stage_name
from bitmoe.train.manifest import MANIFEST, read_manifest, write_manifest
from bitmoe.train.open_source import open_source
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe.train.weight_folder import WeightFolder, write_weight_folder

_PARITY = "parity.json"
# Tokenizer, configs, manifest and headers of files.
_OVERHEAD_BYTES = 64 << 20


@dataclass
class _Conversion:
    """One conversion on its way."""

    config: ConvertConfig
    source: Any
    """A ``WeightSource`` that has a ``tokenizer``."""
    folder: Path
    progress: ConvertProgress

    @property
    def num_tensors(self) -> int:
        return len(export_shapes(self.source.config))


def convert(config: ConvertConfig) -> int:
    """Convert a model.

    Args:
        config: complete (``validate_conversion``).

    Returns:
        Exit status 0.

    Raises:
        InputError: the source is damaged, the target cannot hold the model, there is no room, or what was written is
            not the model; nothing is left then.
    """
    progress = ConvertProgress()
    with progress.phase("reading"):
        source = _open(config)
    target = "gguf i2_s" if (config.to, config.gguf_type) == (Target.gguf, GgufType.i2_s) else config.to.value
    reasons = refusals(source.config, target, config.as_int8)
    if reasons:
        raise InputError(
            f"{target} cannot hold this model:" + "".join(f"\n  {reason}" for reason in reasons),
            fix="to=bitmoe holds every model",
            key="to",
        )
    _say_stage(source)
    out = Path(config.out)
    with output_folder(out, _needed_bytes(config, source)) as folder:
        report = _WRITERS[config.to](_Conversion(config, source, folder, progress))
    _say(out, report, source)
    return 0


def _open(config: ConvertConfig) -> Any:
    """The source's weights: a folder with transformers' config.json, or anything that a run can start from."""
    path = Path(config.source)
    if not (path / CONFIG_FILE).is_file():
        return open_source(path)
    try:
        model_type = json.loads((path / CONFIG_FILE).read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path / CONFIG_FILE} is no JSON object", fix="download the file again") from error
    if model_type == "bitmoe":
        raise InputError(
            f"{path} is a packed model, which has no weights to convert",
            fix="convert the checkpoint it was made from",
            key="source",
        )
    return HFBitNetWeights(path, config.precision)


def _to_bitmoe(job: _Conversion) -> dict[str, Any]:
    model, tokenizer = job.source, job.source.tokenizer
    with job.progress.phase("writing", job.num_tensors * 2) as tell:
        digests = write_packed(model, tokenizer, job.folder, job.config.packing, tell)
    report = _compare(job, lambda: PackedExport(job.folder, model.config))
    write_packed_manifest(job.folder, digests)
    verify_packed(job.folder)
    return report


def _to_hf(job: _Conversion) -> dict[str, Any]:
    model, tokenizer, weights = job.source, job.source.tokenizer, job.config.hf_weights
    with job.progress.phase("writing", job.num_tensors) as tell:
        ids = special_ids(tokenizer).as_keys()
        if weights is HfWeights.compressed:
            write_compressed(model, job.folder, tell, ids)
        else:
            write_hf(model, job.folder, packed=weights is HfWeights.packed, progress=tell, token_ids=ids)
        write_tokenizer_files(tokenizer, job.folder, model.config.context.seq_length)
    if weights is HfWeights.compressed:
        return _compare(job, lambda: CompressedExport(job.folder, model.config))
    return _compare(job, lambda: HfExport(job.folder, weights is HfWeights.packed))


def _to_gguf(job: _Conversion) -> dict[str, Any]:
    file = job.folder / f"model-{job.config.gguf_type.value}.gguf"
    with job.progress.phase("writing", job.num_tensors) as tell:
        write_gguf(job.source, file, job.config.gguf_type.value, job.source.tokenizer, tell)
    return _compare(job, lambda: GgufExport(file, job.source.config))


def _to_checkpoint(job: _Conversion) -> dict[str, Any]:
    with job.progress.phase("writing", job.num_tensors) as tell:
        write_weight_folder(job.source, job.folder, tell, job.source.tokenizer)
    with job.progress.phase("comparing", job.num_tensors) as tell:
        report = check_weights(job.source, WeightFolder(job.folder), tell)
    # The manifest lists every file, so it is made again.
    manifest = job.folder / MANIFEST
    kind = read_manifest(manifest)["kind"]
    manifest.unlink()
    write_json(job.folder / _PARITY, report)
    write_manifest(job.folder, {"kind": kind})
    return report


_WRITERS: dict[Target, Callable[[_Conversion], dict[str, Any]]] = {
    Target.bitmoe: _to_bitmoe,
    Target.hf: _to_hf,
    Target.gguf: _to_gguf,
    Target.checkpoint: _to_checkpoint,
}


def _compare(job: _Conversion, read_back: Callable[[], WrittenExport]) -> dict[str, Any]:
    """Check what was written and write ``parity.json`` beside it."""
    tokens_BS, text = check_tokens(job.source.config, job.source.tokenizer, job.config.check_tokens)
    with job.progress.phase("comparing", job.num_tensors) as tell:
        report = {"text": text, **check_export(job.source, read_back(), tokens_BS, tell)}
    write_json(job.folder / _PARITY, report)
    return report


def _say_stage(source: Any) -> None:
    """Warn of a checkpoint that was taken before the last bit stage began: it is converted in that stage's formats."""
    if not isinstance(source, ShardedWeights) or source.step < 1:
        return
    quant, steps = source.config.quant, source.config.run.steps
    reached, stage = stage_at(min(source.step, steps), quant, steps)
    if reached < len(quant.stages) - 1:
        last = stage_name(quant.stages[-1])
        print(f"warning: trained for {source.step} of {steps} steps, in {stage_name(stage)}; converted in {last}")


def _needed_bytes(config: ConvertConfig, source: Any) -> int:
    if config.to is Target.checkpoint or (config.to is Target.hf and config.hf_weights is HfWeights.online):
        width = 2 if source.config.run.precision is Precision.bf16 else 4
        return width * _num_parameters(source) + _OVERHEAD_BYTES
    packing = config.packing if config.to is Target.bitmoe else Packing["2bit"]
    return packed_bytes(source.config, packing) + _OVERHEAD_BYTES


def _num_parameters(source: Any) -> int:
    return sum(prod(shape) for shape in export_shapes(source.config).values())


def _say(out: Path, report: dict[str, Any], source: Any) -> None:
    written = sum(path.stat().st_size for path in out.iterdir())
    in_bf16 = 2 * _num_parameters(source)
    print(f"{out}: {written / 2**20:,.1f} MiB ({written / in_bf16:.1%} of {in_bf16 / 2**20:,.1f} MiB in bf16)")
    tensors = f"{report['tensors']} tensors"
    if report["codes"]:
        tensors += f", {report['codes']:,} ternary codes identical"
    if report["worst_tensor"]:
        tensors += f", largest relative difference {report['largest_difference']:.1e} in {report['worst_tensor']}"
    if "mean_kl" in report:
        print(
            f"parity with the training forward on {report['tokens']} tokens ({report['text']}): "
            f"top-1 {report['top1_agreement']:.2%}, mean KL {report['mean_kl']:.1e}, "
            f"cosine {report['mean_cosine']:.6f}; {tensors}"
        )
    else:
        print(f"parity with the source: {tensors}, bit by bit")
