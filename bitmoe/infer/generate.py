"""``bitmoe generate``: continue a prompt with an exported model, streamed to standard output.

The text goes to standard output and everything else to standard error, so that the one can be piped. All the work is
transformers' own ``generate``; this loads the model, reads the prompt and measures.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

import bitmoe.infer  # noqa: F401 (teaches transformers the packed format)
from bitmoe.config.errors import InputError
from bitmoe.config.generate_schema import GenerateConfig


def generate(config: GenerateConfig, prompt: str | None = None) -> int:
    """Stream a continuation of the prompt, then say how fast it went.

    Args:
        config: what to load and how to draw (``validate_generation``).
        prompt: text to continue; None reads ``config.prompt_file``, or else standard input.

    Returns:
        Exit status 0.

    Raises:
        InputError: no prompt, or one longer than the model's context.
    """
    text = _read_prompt(config.prompt_file) if prompt is None else prompt
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(config.source, **local)
    model = AutoModelForCausalLM.from_pretrained(config.source, dtype="auto", use_safetensors=True, **local).to(device)
    prompt_1S = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    room = model.config.max_position_embeddings - prompt_1S.shape[1]
    if not 0 < prompt_1S.shape[1] < model.config.max_position_embeddings:
        raise InputError(
            f"the prompt has {prompt_1S.shape[1]} tokens, the context {model.config.max_position_embeddings}",
            fix="give a text that leaves room for its continuation",
        )
    if config.kv_bits is not None and model.config.model_type != "bitmoe":
        fix = "leave it out, or convert the model with to=bitmoe"
        raise InputError(f"{config.kv_bits}, but {config.source} is no packed model", fix=fix, key="kv_bits")
    set_seed(config.seed)
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(prompt_1S, streamer=streamer, max_new_tokens=min(config.max_new_tokens, room), **_draws(config))
    print(_speed(streamer, prompt_1S.shape[1], model, device), file=sys.stderr)
    return 0


class _TimedStreamer(TextStreamer):
    """Prints tokens as they come and remembers when they came; the first entry is the prompt's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def _read_prompt(prompt_file: str | None) -> str:
    if prompt_file is None:
        if sys.stdin.isatty():
            print("prompt (end with Ctrl-D):", file=sys.stderr)
        return sys.stdin.read()
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {prompt_file} ({error})", fix="give a UTF-8 text file", key="prompt_file"
        ) from error


def _draws(config: GenerateConfig) -> dict[str, object]:
    cache = {} if config.kv_bits is None else {"kv_bits": config.kv_bits}
    if config.temperature == 0:
        return {"do_sample": False} | cache
    return {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0} | cache


def _speed(streamer: _TimedStreamer, prompt_tokens: int, model: PreTrainedModel, device: torch.device) -> str:
    """One line: how long the prompt took, how fast tokens came, on what."""
    started, *times = streamer.times
    first = times[0] - started
    later = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{prompt_tokens} tokens of prompt in {first:.2f} s{later} ({len(times)} new, {where}, {model.dtype})"
