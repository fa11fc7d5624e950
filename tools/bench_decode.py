"""Tokens per second of one text, with a model of random codes in a preset's shape: speed does not ask for training.

    python tools/bench_decode.py model=700m context.kv_bits=3

Arguments are overrides of ``bitmoe pretrain``'s config. On a GPU it decodes eagerly, without graphs.
"""

import statistics
import sys
import time

import torch

from bitmoe.config.compose import compose
from bitmoe.config.convert_schema import Packing
from bitmoe.convert.packed_config import packed_config
from bitmoe.convert.tokenizer_files import SpecialIds
from bitmoe.infer import BitmoeConfig, BitmoeForCausalLM
from bitmoe.model.sizes import with_vocab_size
from bitmoe_kernels.ternary_pack import pack

PROMPT_TOKENS, NEW_TOKENS, WARMUP_TOKENS = 32, 64, 8


@torch.inference_mode()
def main() -> None:
    """Build, decode greedily, print one line."""
    overrides = sys.argv[1:] or ["model=700m"]
    defaults = ["moe=none", "parallel=single", "context=2k", "model.vocab_size=32000"]
    config = with_vocab_size(compose([*defaults, *overrides]))
    settings = packed_config(config, Packing["2bit"], SpecialIds(eos=0, pad=0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = BitmoeForCausalLM(BitmoeConfig(**settings)).eval()
    packed_bytes = 0
    for module in model.modules():
        if getattr(module, "weight_scale", None) is not None:
            codes = torch.randint(-1, 2, (*module.weight.shape[:-1], module.in_features), dtype=torch.int8)
            module.weight.copy_(pack(codes))
            module.weight_scale.fill_(0.02)
            packed_bytes += module.weight.nbytes
    model = model.to(device)
    prompt_1S = torch.randint(1, config.model.vocab_size, (1, PROMPT_TOKENS), device=device)
    times = _times_of_tokens(model, prompt_1S)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{' '.join(overrides)}: {1 / statistics.median(times):.1f} tokens/s "
        f"({packed_bytes / 2**20:.0f} MiB of packed weights, {model.dtype}, {where}, torch {torch.__version__})"
    )


def _times_of_tokens(model: BitmoeForCausalLM, prompt_1S: torch.Tensor) -> list[float]:
    """Seconds of each decoded token after some for warming up."""
    tokens_1S, cache, times = prompt_1S, None, []
    for _ in range(NEW_TOKENS + WARMUP_TOKENS):
        start = time.perf_counter()
        out = model(tokens_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_1S, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        tokens_1S.tolist()  # waits for the device
        times.append(time.perf_counter() - start)
    return times[WARMUP_TOKENS + 1 :]


if __name__ == "__main__":
    main()
