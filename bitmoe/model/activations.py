"""Bytes that the forward pass of one layer keeps for its backward pass, on one rank.

A transcript of what the autograd functions of ``bitmoe.layers`` save: codes and scales where a linear is quantized,
both factors of every product elsewhere. Views keep the whole tensor they look into. Routing is taken to be even, so
that every rank gets as many rows of routed experts as it sends.
"""

from dataclasses import dataclass

from bitmoe.config.schema import Activation, Config, Precision, Recompute, WeightFormat
from bitmoe.model.sizes import head_dim, num_query_groups, padded_vocab_size

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Activations:
    """Sizes that all layers of a rank share.

    Args:
        config: a layout without problems; model.vocab_size known.
    """

    config: Config

    @property
    def element(self) -> int:
        """Bytes of an element of the residual stream."""
        return 2 if self.config.run.precision is Precision.bf16 else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.run.micro_batch_size * self.config.context.seq_length

    @property
    def local_tokens(self) -> int:
        """Tokens between the linears, of which sequence parallelism leaves a rank its slice."""
        parallel = self.config.parallel
        return self.tokens // parallel.tensor if parallel.sequence else self.tokens

    @property
    def expert_rows(self) -> int:
        """Rows (copies of tokens) that a rank's routed experts work on."""
        return self.local_tokens * self.config.moe.router_topk * self.config.parallel.expert_tensor

    @property
    def hidden_bytes(self) -> int:
        """The residual stream once."""
        return self.element * self.local_tokens * self.config.model.hidden_size

    def saved_by_layer(self) -> int:
        """Bytes that one layer keeps, whatever run.recompute says of the layer as a whole."""
        return 2 * self._norm() + self._attention() + (self._moe() if self.config.moe.num_experts else self._dense())

    def saved_by_head(self) -> int:
        """Bytes that the final norm and the head keep, without the logits."""
        return self._norm() + self.hidden_bytes

    def logits(self) -> int:
        """Bytes of logits and cross-entropy at their largest."""
        rows = self.tokens * padded_vocab_size(self.config.model)
        if self.config.run.deterministic:
            # The whole vocabulary on every rank: logits as they are, in fp64, and their log-softmax.
            return rows * (self.element + 2 * 8)
        in_fp32 = FP32 if self.element == FP32 else FP32 + self.element
        return rows // self.config.parallel.tensor * in_fp32

    def temporaries(self) -> int:
        """Bytes that the largest product needs while it runs: fp32 sums of codes, and again after each scale.

        A row-parallel product has such sums for each of its groups. Experts need one copy more, of the scales that
        each row has or of the groups put side by side.
        """
        config, moe, ranks = self.config, self.config.moe, self.config.parallel.tensor
        width = moe.shared_expert_size if moe.num_experts else config.model.ffn_hidden_size
        dense = max(self._qkv_features(), self._widest(width, ranks))
        experts = self._widest(moe.ffn_hidden_size, config.parallel.expert_tensor) if moe.num_experts else 0
        if not self._is_ternary:
            return self.element * max(self.tokens * dense, self.expert_rows * experts)
        return FP32 * max(3 * self.tokens * dense, 4 * self.expert_rows * experts)

    def _widest(self, width: int, ranks: int) -> int:
        """Numbers a row that gate and up, or down (and o) with its groups, put out."""
        groups = max(1, self.config.quant.groups // ranks) if self._is_ternary else 1
        return max(2 * width // ranks, groups * self.config.model.hidden_size)

    @property
    def _is_ternary(self) -> bool:
        return self.config.quant.weights is WeightFormat.ternary

    def _qkv_features(self) -> int:
        model = self.config.model
        heads = model.num_attention_heads + 2 * num_query_groups(model)
        return heads * head_dim(model) // self.config.parallel.tensor

    def _norm(self) -> int:
        """The input in fp32, the same over its RMS, and one over the RMS."""
        return FP32 * self.local_tokens * (2 * self.config.model.hidden_size + 1)

    def _input(self, rows: int, features: int, scales: int = 1) -> int:
        """What a linear keeps of its input: int8 codes and fp32 scales, or the input."""
        return rows * (features + FP32 * scales) if self._is_ternary else self.element * rows * features

    def _row_parallel(self, rows: int, features: int, ranks: int) -> int:
        """What sub-norm and row-parallel linear keep, without the sub-norm's input."""
        groups = max(1, self.config.quant.groups // ranks)
        normalized = rows * (self.element * features + FP32 * groups) if self.config.model.sub_norm else 0
        return normalized + self._input(rows, features, groups)

    def _attention(self) -> int:
        config, tokens, element = self.config, self.tokens, self.element
        model, ranks = config.model, config.parallel.tensor
        heads, width = model.num_attention_heads // ranks, head_dim(model)
        keys = num_query_groups(model) // ranks * width
        # Rotated queries and keys; the values are a view into the product that all three come from.
        core = element * tokens * (heads * width + keys + self._qkv_features())
        # Cosines and sines that queries and keys were rotated by.
        core += 4 * element * config.context.seq_length * width
        # Behind them one number a row for the softmax, and the output, which the sub-norm keeps in any case.
        is_whole = config.run.recompute is not Recompute.selective
        if is_whole:
            core += FP32 * tokens * heads
        if is_whole or model.sub_norm:
            core += element * tokens * heads * width
        linears = self._input(self.local_tokens, model.hidden_size) + self._row_parallel(tokens, heads * width, ranks)
        return core + linears

    def _gated(self, rows: int, features: int) -> int:
        """What the activation keeps, and its output where a sub-norm keeps that."""
        if self.config.model.activation is Activation.swiglu:
            saved = 3 * self.element
        else:
            # relu(gate), its square, and up: in fp32, where bf16 needs a copy and fp32 keeps gate with up.
            saved = 2 * FP32 + (FP32 if self.element == 2 else 2 * FP32)
        return rows * features * (saved + (self.element if self.config.model.sub_norm else 0))

    def _dense(self) -> int:
        fc1_input = self._input(self.local_tokens, self.config.model.hidden_size)
        return fc1_input + self._feed_forward(self.config.model.ffn_hidden_size)

    def _feed_forward(self, width: int) -> int:
        """A tensor-parallel FFN behind its input."""
        ranks = self.config.parallel.tensor
        return self._gated(self.tokens, width // ranks) + self._row_parallel(self.tokens, width // ranks, ranks)

    def _moe(self) -> int:
        moe, hidden = self.config.moe, self.config.model.hidden_size
        slices, rows = self.config.parallel.expert_tensor, self.expert_rows
        features = moe.ffn_hidden_size // slices
        # The router's input in fp32; logits, probabilities and the losses over them.
        saved = FP32 * self.local_tokens * (hidden + 4 * moe.num_experts)
        saved += self._input(rows, hidden) + self._gated(rows, features) + self._row_parallel(rows, features, slices)
        if self.config.model.sub_norm:
            saved += self.element * rows * features  # the gain of each row
        # What comes home waits for the gradient of its probability.
        saved += self.local_tokens * moe.router_topk * (self.element * hidden + INT64 + FP32)
        if moe.shared_expert_size:
            # An unquantized shared expert keeps the input in fp32 that the router keeps too.
            is_kept = not self._is_ternary and self.element == FP32
            saved += 0 if is_kept else self._input(self.local_tokens, hidden)
            saved += self._feed_forward(moe.shared_expert_size)
        return saved
