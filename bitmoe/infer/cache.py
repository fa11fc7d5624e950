"""A transformers cache that keeps keys and values at 4 or 3 bits, packed, after rotation.

BitNet a4.8 quantizes the heads of keys and values post-RoPE without training for it, and keeps the beginning of the
text at 4 bits where the others have 3: much attention goes to it. Its keys and values are kept a second time at 4 bits
and take the place of the 3-bit ones when the cache is read. The beginning is the token at position 0, and where padding
in front of it says position 0 too, the last of those; without positions it is the first token there is.

Attention sees what the cache holds, also for the tokens of the call itself, so that a prompt gives the same whether it
comes at once or token by token. Codes are made once, when a token arrives. Reading dequantizes everything, in plain
torch.
"""

# Shapes: B = batch, K = key/value heads, S = new tokens, L = tokens kept, C = capacity in tokens, D = width of a head,
#         W = bytes of a head.

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from bitmoe.config.errors import InputError
from bitmoe.infer.configuration import BitmoeConfig
from bitmoe_kernels.kv_quant import dequantize_kv, packed_width, quantize_kv

_FIRST_BITS = 4
# Capacity grows by a quarter, in steps of this many tokens: copies stay rare, and little room is idle.
_CAPACITY_STEP = 64


class PackedHeads:
    """Keys, or values, of one layer: codes and scales of all tokens, and the first token at 4 bits if others have 3.

    Args:
        x_BKSD: states like those to come; shape, dtype and device count.
        bits: 4 or 3.
    """

    def __init__(self, x_BKSD: torch.Tensor, bits: int):
        batch, num_heads, _, self.head_dim = x_BKSD.shape
        self.bits, self.dtype = bits, x_BKSD.dtype
        bytes_like, scale_like = x_BKSD.new_empty(0, dtype=torch.uint8), x_BKSD.new_empty(0, dtype=torch.bfloat16)
        self.packed_BKCW = bytes_like.new_empty(batch, num_heads, 0, packed_width(self.head_dim, bits))
        self.scale_BKC = scale_like.new_empty(batch, num_heads, 0)
        self.first_packed_BKW = bytes_like.new_zeros(batch, num_heads, packed_width(self.head_dim, _FIRST_BITS))
        self.first_scale_BK = scale_like.new_zeros(batch, num_heads)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds, by attribute; the first dimension is the batch."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens."""
        missing = capacity - self.scale_BKC.shape[2]
        self.packed_BKCW = torch.nn.functional.pad(self.packed_BKCW, (0, 0, 0, missing))
        self.scale_BKC = torch.nn.functional.pad(self.scale_BKC, (0, missing))

    def write(self, x_BKSD: torch.Tensor, start: int) -> None:
        """Quantize tokens into their places from ``start`` on."""
        places = slice(start, start + x_BKSD.shape[2])
        self.packed_BKCW[:, :, places], self.scale_BKC[:, :, places] = quantize_kv(x_BKSD, self.bits)

    def write_first(self, x_BKD: torch.Tensor, is_new_B: torch.Tensor) -> None:
        """Keep a token of each row at 4 bits; rows where it is not new keep theirs."""
        packed_BKW, scale_BK = quantize_kv(x_BKD, _FIRST_BITS)
        self.first_packed_BKW = torch.where(is_new_B[:, None, None], packed_BKW, self.first_packed_BKW)
        self.first_scale_BK = torch.where(is_new_B[:, None], scale_BK, self.first_scale_BK)

    def read(self, length: int, first_B: torch.Tensor | None) -> torch.Tensor:
        """[B, K, L, D], with the token kept at 4 bits in place ``first_B`` if that is given."""
        packed_BKLW, scale_BKL = self.packed_BKCW[:, :, :length], self.scale_BKC[:, :, :length]
        x_BKLD = dequantize_kv(packed_BKLW, scale_BKL, self.bits, self.head_dim, self.dtype)
        if first_B is not None:
            rows_B = torch.arange(len(first_B), device=first_B.device)
            first_BKD = dequantize_kv(
                self.first_packed_BKW, self.first_scale_BK, _FIRST_BITS, self.head_dim, self.dtype
            )
            x_BKLD[rows_B, :, first_B] = first_BKD
        return x_BKLD


class LowBitLayer(CacheLayerMixin):
    """The cache of one layer.

    Args:
        bits: 4 or 3.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, bits: int):
        super().__init__()
        if bits not in (3, 4):
            raise InputError(f"keys and values cannot be kept at {bits!r} bits", fix="use 16, 4 or 3", key="kv_bits")
        self.bits, self.length, self.capacity = bits, 0, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = PackedHeads(key_states, self.bits), PackedHeads(value_states, self.bits)
        self.first_B = torch.zeros(len(key_states), dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, K, S, D]; return all keys and values [B, K, L, D] as the cache holds them.

        Args:
            key_states: new keys, rotated.
            value_states: new values.
            position_ids: positions [B, S] of the new tokens, or [1, S]; they tell where each text begins.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.capacity:
            wanted = max(self.length, self.capacity * 5 // 4)
            self.capacity = -(-wanted // _CAPACITY_STEP) * _CAPACITY_STEP
            for heads in (self.keys, self.values):
                heads.reserve(self.capacity)
        self.keys.write(key_states, start)
        self.values.write(value_states, start)
        is_prompt = start == 0 or self.length - start > 1
        if self.bits < _FIRST_BITS and is_prompt:
            self._keep_first(key_states, value_states, start, position_ids)
        first_B = self.first_B if self.bits < _FIRST_BITS else None
        return self.keys.read(self.length, first_B), self.values.read(self.length, first_B)

    def _keep_first(self, key_states, value_states, start: int, position_ids: torch.Tensor | None) -> None:
        """Keep the token at position 0 of each row, where it is among the new ones."""
        places_S = torch.arange(key_states.shape[2], device=self.device)
        position_ids = (start + places_S).unsqueeze(0) if position_ids is None else position_ids
        last_place_B = torch.where(position_ids == 0, places_S, -1).amax(-1).expand(len(key_states))
        is_new_B, place_B = last_place_B >= 0, last_place_B.clamp(min=0)
        rows_B = torch.arange(len(key_states), device=self.device)
        self.keys.write_first(key_states[rows_B, :, place_B], is_new_B)
        self.values.write_first(value_states[rows_B, :, place_B], is_new_B)
        self.first_B = torch.where(is_new_B, start + place_B, self.first_B)

    @property
    def nbytes(self) -> int:
        """Bytes it takes, with scales, the first tokens and room not used yet."""
        if not self.is_initialized:
            return 0
        tensors = [self.first_B, *self.keys.tensors().values(), *self.values.tensors().values()]
        return sum(tensor.nbytes for tensor in tensors)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length, self.capacity = False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget ``-tokens_to_remove`` tokens at the end; a positive number is how many stay (transformers < 5.18)."""
        length = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = min(self.length, max(0, length))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace_tensors(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._replace_tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._replace_tensors(lambda x: x.to(self.device, non_blocking=True))

    def _replace_tensors(self, change) -> None:
        """Replace every tensor by what ``change`` makes of it."""
        if not self.is_initialized:
            return
        self.first_B = change(self.first_B)
        for heads in (self.keys, self.values):
            for name, tensor in heads.tensors().items():
                setattr(heads, name, change(tensor))


class LowBitCache(Cache):
    """Keys and values of all layers at 4 or 3 bits.

    Args:
        num_layers: layers of the model.
        bits: 4 or 3.

    Raises:
        InputError: another number of bits.
    """

    def __init__(self, num_layers: int, bits: int):
        super().__init__(layers=[LowBitLayer(bits) for _ in range(num_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def new_cache(config: BitmoeConfig, kv_bits: int | None = None) -> Cache:
    """An empty cache of ``kv_bits``, or of what the config says: transformers' own for 16 bits."""
    bits = config.kv_bits if kv_bits is None else kv_bits
    return DynamicCache(config=config) if bits == 16 else LowBitCache(config.num_hidden_layers, bits)
