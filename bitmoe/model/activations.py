"""Bytes that the forward pass of one layer keeps for its backward pass, on one rank.

A transcript of what the autograd functions of ``bitmoe.layers`` save: codes and scales where a linear is quantized, the
inputs of norms and activations, both factors of every product elsewhere. A tensor that two functions save counts once;
views keep the whole tensor they look into. Routing is taken to be even, so that every rank gets as many rows of routed
experts as it sends; without a capacity.
"""

from dataclasses import dataclass

from bitmoe.config.choices import Activation, BackwardFormat, Precision, Recompute, Score, WeightFormat
from bitmoe.config.schema import Config
from bitmoe.model.sizes import head_dim, num_query_groups, padded_vocab_size

INT32, FP32, INT64, FP64 = 4, 4, 8, 8


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
        """Bytes of logits and cross-entropy at their largest: on a GPU the gradient takes the logits' place."""
        rows = self.tokens * padded_vocab_size(self.config.model)
        if self.config.run.deterministic:
            # The whole vocabulary on every rank: logits as they are, in fp64, and their log-softmax.
            return rows * (self.element + 2 * FP64)
        # With a label and three numbers of the softmax for each token.
        return rows // self.config.parallel.tensor * self.element + self.tokens * (INT64 + 3 * FP32)

    def temporaries(self) -> int:
        """Bytes that the largest product of a layer's linears needs while it runs, beside what is kept in any case.

        Of the backward pass that is the gradient that comes in, both that come out, and what the products make of the
        first, of codes and of scales; of the forward pass fp32 sums of codes, where scales come after.
        """
        config, moe, ranks = self.config, self.config.moe, self.config.parallel.tensor
        needs = [
            self._column_temporaries(self.tokens, self._qkv_features()),
            self._row_temporaries(self.tokens, self._heads_features(), ranks),
        ]
        if not moe.num_experts:
            needs += self._feed_forward_temporaries(self.tokens, config.model.ffn_hidden_size, ranks)
            return max(needs)
        experts, slices = moe.num_experts // config.parallel.expert, config.parallel.expert_tensor
        needs += self._feed_forward_temporaries(self.expert_rows, moe.ffn_hidden_size, slices, experts)
        if moe.shared_expert_size:
            needs += self._feed_forward_temporaries(self.tokens, moe.shared_expert_size, ranks)
        return max(needs)

    def _feed_forward_temporaries(self, rows: int, width: int, ranks: int, experts: int = 0) -> list[int]:
        """Of gate and up, and of down; ``experts`` is 0 for a dense layer."""
        features = width // ranks
        recomputed = self.element * rows * 2 * features if self.config.run.recompute is Recompute.ffn else 0
        return [
            self._column_temporaries(rows, 2 * features, experts) + recomputed,
            self._row_temporaries(rows, features, ranks, experts),
        ]

    def _column_temporaries(self, rows: int, outputs: int, experts: int = 0) -> int:
        hidden = self.config.model.hidden_size
        weights = max(1, experts) * hidden * outputs
        return self._gradients(rows * hidden, rows * outputs, weights, is_column=True)

    def _row_temporaries(self, rows: int, features: int, ranks: int, experts: int = 0) -> int:
        hidden, groups = self.config.model.hidden_size, self._groups(ranks)
        sizes = (rows * features, rows * hidden, max(1, experts) * hidden * features)
        backward = self._gradients(*sizes, is_column=False)
        # Sums of codes, times the one scale, times the other; bf16 adds whole groups in the product's own kernel.
        is_exact = groups > 1 and (self.element == FP32 or self.config.run.deterministic)
        is_summed = self._is_ternary and (is_exact or not self._holds_groups(ranks))
        return max(backward, 3 * FP32 * rows * hidden if is_summed else 0)

    def _gradients(self, x: int, y: int, w: int, is_column: bool) -> int:
        """Bytes of a product's backward pass, given the numbers of elements of its input, output and weights."""
        element = self.element
        if not self._is_ternary:
            return element * (x + y + w)
        if self.config.quant.backward is BackwardFormat.bf16:
            # dY, dX, then the dequantized input and dW; the dequantized weights are gone by then.
            return element * (2 * x + y + w)
        # dY and its codes make dX. For dW codes of 4-bit inputs and of dY are transposed, INT8 inputs dequantized.
        return element * (x + y + w) + (2 * y + x if is_column else element * x)

    @property
    def _is_ternary(self) -> bool:
        return self.config.quant.weights is WeightFormat.ternary

    def _holds_groups(self, ranks: int) -> bool:
        """Whether each rank of a row-parallel linear has whole groups."""
        return self.config.quant.groups % ranks == 0

    def _groups(self, ranks: int) -> int:
        """Groups of a row-parallel linear that a rank has a part of."""
        return max(1, self.config.quant.groups // ranks)

    def _heads_features(self) -> int:
        """Width of the attention's output."""
        model = self.config.model
        return model.num_attention_heads * head_dim(model) // self.config.parallel.tensor

    def _qkv_features(self) -> int:
        model = self.config.model
        return self._heads_features() + 2 * num_query_groups(model) * head_dim(model) // self.config.parallel.tensor

    def _norm(self) -> int:
        """The input, and one over its RMS."""
        return self.hidden_bytes + FP32 * self.local_tokens

    def _input(self, rows: int, features: int, scales: int = 1) -> int:
        """What a linear keeps of its input: codes of one byte and fp32 scales, or the input."""
        return rows * (features + FP32 * scales) if self._is_ternary else self.element * rows * features

    def _row_parallel(self, rows: int, features: int, ranks: int, is_fused: bool, is_routed: bool = False) -> int:
        """What sub-norm and row-parallel linear keep, without what comes in."""
        saved, groups = 0, self._groups(ranks)
        if self.config.model.sub_norm:
            saved += FP32 * rows * groups
            if not is_fused:
                # The gain waits for the normalized input and, where each row has its own, the other way round.
                saved += self.element * rows * features * (2 if is_routed else 1)
        # Without sub-norm and quantizer the linear's input is what comes in.
        is_other = self._is_ternary or self.config.model.sub_norm
        return saved + (self._input(rows, features, groups) if is_other else 0)

    @property
    def _keeps_source(self) -> bool:
        """Whether sub-norm or row-parallel linear keep what comes in; a quantizer alone does not."""
        return self.config.model.sub_norm or not self._is_ternary

    def _attention(self) -> int:
        config, tokens = self.config, self.tokens
        model, features = config.model, self._heads_features()
        saved = self._input(self.local_tokens, model.hidden_size)
        # Queries, keys and values, and the cosines and sines that the first two were rotated by.
        saved += self.element * tokens * self._qkv_features() + FP32 * config.context.seq_length * head_dim(model)
        # Behind them one number a row for the softmax, and the output.
        is_whole = config.run.recompute is not Recompute.selective
        if is_whole:
            saved += FP32 * tokens * features // head_dim(model)
        if is_whole or self._keeps_source:
            saved += self.element * tokens * features
        ranks = config.parallel.tensor
        is_fused = self._is_ternary and self._holds_groups(ranks)
        return saved + self._row_parallel(tokens, features, ranks, is_fused)

    def _dense(self) -> int:
        fc1_input = self._input(self.local_tokens, self.config.model.hidden_size)
        return fc1_input + self._feed_forward(self.config.model.ffn_hidden_size)

    def _feed_forward(self, width: int) -> int:
        """A tensor-parallel FFN behind its input."""
        ranks = self.config.parallel.tensor
        return self._activated_down(self.tokens, width // ranks, ranks)

    def _activated_down(self, rows: int, features: int, ranks: int, is_routed: bool = False) -> int:
        """Activation, sub-norm and down projection, in one kernel where possible."""
        is_relu2 = self.config.model.activation is Activation.relu2_glu
        # No kernel normalizes experts' rows, whose gains differ, behind SwiGLU.
        is_fused = self._is_ternary and self._holds_groups(ranks) and (is_relu2 or not is_routed)
        if is_fused and is_relu2:
            activation = 0 if self.config.run.recompute is Recompute.ffn else 2 * self.element  # gate and up
        else:
            activation = self._unfused_activation() + (self.element if self._keeps_source else 0)
            # What a routing probability multiplies waits for its gradient.
            activation += self.element if is_routed else 0
        return rows * features * activation + self._row_parallel(rows, features, ranks, is_fused, is_routed)

    def _unfused_activation(self) -> int:
        """Bytes an inner feature that torch's autograd keeps."""
        if self.config.model.activation is Activation.swiglu:
            return 3 * self.element
        # relu(gate), its square, and up: in fp32, where bf16 needs a copy and fp32 keeps gate with up.
        return 2 * FP32 + (FP32 if self.element == 2 else 2 * FP32)

    def _moe(self) -> int:
        moe, hidden, slices = self.config.moe, self.config.model.hidden_size, self.config.parallel.expert_tensor
        rows = self.expert_rows
        # On one rank codes are kept once a token, and a scale for each of its rows.
        is_once = self._is_ternary and self._is_dispatch_local
        saved = self._router() + (self.local_tokens * hidden + FP32 * rows if is_once else self._input(rows, hidden))
        saved += self._activated_down(rows, moe.ffn_hidden_size // slices, slices, is_routed=True)
        # The probability and the expert of each row.
        saved += (FP32 + INT32) * rows
        # Where rows go: their numbers and tokens, or megatron-core's two maps and one sort, and a 1 for each of them.
        home = self.local_tokens * moe.router_topk
        saved += 2 * INT32 * home if self._is_dispatch_local else 2 * self.local_tokens * moe.num_experts
        saved += 0 if self._is_dispatch_local else (INT64 + FP32) * home
        if moe.shared_expert_size:
            # An unquantized shared expert keeps the input in fp32 that the router keeps too.
            is_kept = not self._is_ternary and self.element == FP32 and not self.config.run.deterministic
            # The codes are those of routed experts' tokens.
            shared_input = FP32 * self.local_tokens if is_once else self._input(self.local_tokens, hidden)
            saved += 0 if is_kept else shared_input
            saved += self._feed_forward(moe.shared_expert_size)
        return saved

    @property
    def _is_dispatch_local(self) -> bool:
        parallel = self.config.parallel
        return parallel.expert == parallel.expert_tensor == 1 and self.config.moe.capacity_factor is None

    def _router(self) -> int:
        """Input and weight as they were cast; scores of all experts and of those chosen, with their numbers."""
        moe, deterministic = self.config.moe, self.config.run.deterministic
        compute = FP64 if deterministic else FP32
        saved = compute * self.local_tokens * self.config.model.hidden_size
        if self.element != compute:
            saved += compute * moe.num_experts * self.config.model.hidden_size
        scores = 3 if moe.score is Score.sigmoid else 2
        saved += FP32 * self.local_tokens * scores * moe.num_experts
        return saved + self.local_tokens * moe.router_topk * (FP32 + 2 * INT64)
