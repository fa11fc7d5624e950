"""The check every export passes before it gets its name: tensor by tensor, and against the training forward."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bitmoe.convert.codes import is_ternary
from bitmoe.convert.parity import TensorComparison, compare_logits, refuse_different
from bitmoe.convert.training_forward import TernaryMatrix, TrainingForward
from bitmoe.convert.written_exports import WrittenExport
from bitmoe.model.export_names import export_shapes
from bitmoe.parallel.alone import alone
from bitmoe.train.weight_folder import WeightFolder
from bitmoe.train.weight_source import WeightSource

# Shapes: B = sequences, S = positions.


def check_export(
    source: WeightSource, export: WrittenExport, tokens_BS: torch.Tensor, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compare what was written with the model.

    Args:
        source: the model.
        export: what was made of it.
        tokens_BS: text to run both on.
        progress: called with the name of each tensor.

    Returns:
        The content of ``parity.json``.

    Raises:
        InputError: a tensor is not what the training forward computes with, or logits differ by more than the limits.
    """
    comparison = TensorComparison(limit=export.limits.scale)

    def compare(matrix: TernaryMatrix) -> None:
        comparison.add_ternary(matrix.name, (matrix.codes, matrix.scale), export.ternary(matrix.name))
        progress(matrix.name)

    for name in export_shapes(source.config):
        if not is_ternary(name, source.config):
            comparison.add_numbers(name, source.read(name), export.numbers(name))
            progress(name)
    with alone() as groups:
        expected_BSV = TrainingForward(source, groups, export.stage).logits(tokens_BS, compare)
    comparison.refuse_wrong()
    logits = compare_logits(expected_BSV, export.logits(tokens_BS).to(expected_BSV.device))
    refuse_different(logits, export.limits)
    return {"tokens": tokens_BS.numel(), **logits, **comparison.as_dict(), "limits": asdict(export.limits)}


def check_weights(source: WeightSource, written: WeightFolder, progress: Callable[[str], None]) -> dict[str, Any]:
    """Compare latent weights bit by bit; arguments and return value as of ``check_export``.

    Raises:
        InputError: a tensor differs.
    """
    comparison = TensorComparison()
    for name in export_shapes(source.config):
        comparison.add_numbers(name, source.read(name), written.read(name))
        progress(name)
    comparison.refuse_wrong()
    return comparison.as_dict()
