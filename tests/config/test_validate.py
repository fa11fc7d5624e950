"""One case for every message of the validation: the key it names and what it says to do."""

import pytest

from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.validate import problems, validate

# Sizes that many layouts divide, whatever the default run is tuned to.
SIZES = ["model.num_layers=4", "run.micro_batch_size=4", "run.steps=300"]
DENSE = ["moe=none", "parallel=single"]
FOUR_LAYERS_TWO_STAGES = [*DENSE, "parallel.pipeline=2"]
STAGES = "quant.stages=[{start:0},{start:0.5,qkv:int4}%s]"

# overrides of the default run, world size, key, fragments of the message
CASES = [
    (["run.recompute=ffn", "quant=none", "quant.groups=1"], 1, "run.recompute", "quant.weights=none", "selective"),
    (["run.recompute=ffn", "model.activation=swiglu"], 1, "run.recompute", "model.activation=swiglu", "relu2_glu"),
    (
        ["run.recompute=ffn", "parallel=tp2", "moe=none", "quant.groups=1"],
        2,
        "run.recompute",
        "quant.groups=1, of which 2 ranks do not hold whole ones",
        "quant.groups=2",
    ),
    # numbers in their range
    (["model.num_layers=0"], None, "model.num_layers", "0 is out of range", "above 0"),
    (["parallel.tensor=-2"], 2, "parallel.tensor", "-2 is out of range", "above 0"),
    (["parallel.virtual_pipeline=0"], None, "parallel.virtual_pipeline", "out of range", "above 0"),
    (["optim.lr=nan"], None, "optim.lr", "nan is out of range", "above 0"),
    (["optim.lr=inf"], None, "optim.lr", "inf is out of range", "above 0"),
    (["optim.switch=1.5"], None, "optim.switch", "1.5 is out of range", "from 0 to 1"),
    (["optim.beta2=1.0"], None, "optim.beta2", "1.0 is out of range", "below 1"),
    (["optim.warmup_steps=-1"], None, "optim.warmup_steps", "-1 is out of range", "0 or more"),
    (["data.eval_fraction=0"], None, "data.eval_fraction", "0.0 is out of range", "below 1"),
    (["moe.capacity_factor=0"], None, "moe.capacity_factor", "0.0 is out of range", "above 0"),
    (["moe.router_topk=0"], None, "moe.router_topk", "0 is out of range", "above 0"),
    (["moe.num_experts=-8"], None, "moe.num_experts", "-8 is out of range", "0 or more"),
    (["run.eval_every=-1"], None, "run.eval_every", "-1 is out of range", "0 or more"),
    (["context.kv_bits=5"], None, "context.kv_bits", "5 is out of range", "16, 4 and 3"),
    (["context.kv_bits=3", "model.head_dim=12"], None, "context.kv_bits", "heads are 12 wide", "multiple of 8"),
    (["quant.stages.1.o_keep=0"], None, "quant.stages[1].o_keep", "out of range", "at most 1"),
    (["data=files", "data.path=[a,b]", "data.weights=[1,0]"], None, "data.weights[1]", "out of range", ""),
    (["run.name=a/b"], None, "run.name", "'a/b' is not a plain name", "run.dir"),
    (["run.name=.."], None, "run.name", "'..' is not a plain name", "run.dir"),
    (["run.name=''"], None, "run.name", "'' is not a plain name", "run.dir"),
    # the model
    (["model.hidden_size=130"], None, "model.hidden_size", "130 does not divide by 4", "a multiple of 4"),
    (["model.head_dim=33"], None, "model.head_dim", "33 is odd", "even"),
    (["model.num_query_groups=3"], None, "model.num_query_groups", "4 attention heads", "one of 1, 2, 4"),
    # bits
    (["quant.stages=[]"], None, "quant.stages", "no stage", "start:0"),
    (["quant.stages=[{start:0.1}]"], None, "quant.stages[0].start", "starts at 0.1", "start: 0"),
    ([STAGES % ",{start:0.5}"], None, "quant.stages[2].start", "step 150 is not after step 150", "order"),
    ([STAGES % ",{start:100}"], None, "quant.stages[2].start", "step 100 is not after step 150", "order"),
    (["quant.weights=none"], None, "quant.stages[0].qkv", "int8 with quant.weights=none", "quant=none"),
    (["quant.stages.1.down=none"], None, "quant.stages[1].down", "none with quant.weights=ternary", "int8"),
    (["quant=none", "quant.backward=8bit"], None, "quant.backward", "8bit with quant.weights=none", "bf16"),
    # quantization groups
    (["quant.groups=4"], None, "quant.groups", "model.num_query_groups=2 does not divide by 4", "1, 2"),
    (
        [*DENSE, "model.ffn_hidden_size=511", "model.num_query_groups=4"],
        None,
        "quant.groups",
        "model.ffn_hidden_size=511 does not divide by 2",
        "one of 1",
    ),
    (["moe.ffn_hidden_size=129"], None, "quant.groups", "moe.ffn_hidden_size=129 does not", "one of 1"),
    (["moe.shared_expert_size=129"], None, "quant.groups", "moe.shared_expert_size=129 does not", "one of 1"),
    (
        ["model.num_query_groups=4", "parallel.tensor=4"],
        None,
        "quant.groups",
        "2 groups do not divide over parallel.tensor=4",
        "quant.groups one of 4, or parallel.tensor one of 1, 2",
    ),
    (
        ["model.num_query_groups=4", "parallel.expert_tensor=4"],
        None,
        "quant.groups",
        "2 groups do not divide over parallel.expert_tensor=4",
        "quant.groups one of 4, or parallel.expert_tensor one of 1, 2",
    ),
    # tensor parallelism
    (["parallel.tensor=3"], None, "parallel.tensor", "4 attention heads do not divide by 3", "one of 1, 2"),
    (["parallel.tensor=4"], None, "parallel.tensor", "2 key/value heads do not divide by 4", "one of 1, 2"),
    (
        [*DENSE, "quant.groups=1", "parallel.tensor=2", "model.ffn_hidden_size=511"],
        None,
        "model.ffn_hidden_size",
        "511 does not divide by parallel.tensor=2",
        "a multiple of 2",
    ),
    (["model.vocab_multiple=5"], None, "model.vocab_multiple", "5 does not divide by parallel.tensor=2", "2"),
    (["parallel.tensor=1"], None, "parallel.sequence", "parallel.tensor is 1", "parallel.sequence=false"),
    (["context.seq_length=255"], None, "context.seq_length", "255 does not divide", "a multiple of 2"),
    # pipeline
    ([*DENSE, "parallel.pipeline=3"], None, "parallel.pipeline", "4 layers do not divide over 3", "of 3"),
    ([*DENSE, "parallel.virtual_pipeline=2"], None, "parallel.virtual_pipeline", "2 chunks", "pipeline=2"),
    (
        [*FOUR_LAYERS_TWO_STAGES, "parallel.virtual_pipeline=3"],
        None,
        "parallel.virtual_pipeline",
        "4 layers do not divide over 2 stages of 3 chunks",
        "a multiple of 6",
    ),
    (
        [*FOUR_LAYERS_TWO_STAGES, "parallel.virtual_pipeline=2", "run.global_batch_size=12"],
        2,
        "run.global_batch_size",
        "3 micro-batches a step do not divide by parallel.pipeline=2",
        "a multiple of 8",
    ),
    # experts
    (["moe=none"], None, "parallel.expert", "2 in a dense model", "parallel.expert=1"),
    ([*DENSE, "parallel.expert_tensor=2"], None, "parallel.expert_tensor", "2 in a dense model", "=1"),
    (["parallel.expert=3"], None, "parallel.expert", "8 experts do not divide by 3", "one of 1, 2, 4, 8"),
    (["moe.router_topk=9"], None, "moe.router_topk", "9 experts for each token", "at most 8"),
    (["moe.router_topk=1"], None, "moe.router_topk", "the softmax of one score is 1", "moe.score=sigmoid"),
    (["moe.expert_bias=true"], None, "moe.expert_bias", "not softmax", "moe.score=sigmoid"),
    (["parallel.sequence=false"], None, "parallel.sequence", "parallel.tensor=2 need sequence", "=true"),
    (
        ["parallel=ep2", "parallel.expert_tensor=2", "quant.groups=1", "moe.ffn_hidden_size=129"],
        None,
        "moe.ffn_hidden_size",
        "129 does not divide by parallel.expert_tensor=2",
        "a multiple of 2",
    ),
    (
        ["quant.groups=1", "moe.shared_expert_size=129"],
        None,
        "moe.shared_expert_size",
        "129 does not divide by parallel.tensor=2",
        "a multiple of 2",
    ),
    # world and batch
    ([], 3, "world size", "attention: tensor 2 x data x pipeline 1 = a multiple of 2", "2 or 4 ranks"),
    (
        ["parallel.expert=4", "parallel.pipeline=2"],
        4,
        "world size",
        "experts: expert_tensor 1 x expert 4 x data x pipeline 2 = a multiple of 8",
        "8 ranks",
    ),
    (["run.global_batch_size=10"], 4, "run.global_batch_size", "x 2 data-parallel ranks", "8 or 16"),
    # recipe and engine
    (["optim.lr_end=1.0"], None, "optim.lr_end", "1.0 is above optim.lr=", "at most"),
    (["optim.lr_second=5e-5"], None, "optim.lr_end", "above optim.lr_second=5e-05", "at most 5e-05"),
    (["engine.name=zero"], None, "engine.name", "no engine 'zero'", "megatron"),
    (["engine.overlap_param_gather=true"], None, "engine.overlap_param_gather", "gradients", "=true"),
    # what names text and tokenizer
    (["data=files"], None, "data.path", "no path", "data.path=[corpus.txt]"),
    (["data.path=[a.txt]"], None, "data.path", "not read with data.source=stdlib", "data=files"),
    (["data=hub"], None, "data.name", "no name", "data.name=OWNER/NAME"),
    (["data=files", "data.path=[a]", "data.weights=[1,2]"], None, "data.weights", "2 weights for 1", "one"),
    (["tokenizer=file"], None, "tokenizer.path", "no path", "tokenizer.path=tokenizer.json"),
]


@pytest.mark.parametrize(
    ("overrides", "world_size", "key", "what", "fix"),
    CASES,
    ids=[f"{key}:{' '.join(overrides)}" for overrides, _, key, _, _ in CASES],
)
def test_validate_refuses(overrides, world_size, key, what, fix):
    config = compose([*SIZES, *overrides])
    with pytest.raises(InputError) as refusal:
        validate(config, world_size)
    refusals = [refusal.value, *problems(config, world_size)]
    matching = [r for r in refusals if r.key == key and what in r.what and fix in r.fix]
    assert matching, "\n\n".join(map(str, refusals))


def test_validate_accepts_the_default_run():
    validate(compose(), 2)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (DENSE, 1),
        ([*DENSE, "parallel.tensor=2"], 2),
        (["moe=none", "parallel=tp2"], 2),
        ([*FOUR_LAYERS_TWO_STAGES, "parallel.virtual_pipeline=2"], 2),
        (["quant.groups=1"], 2),
        (["quant=none", "quant.groups=1"], 2),
        (["quant.backward=8bit"], 2),
        (["parallel=ep2"], 2),
        (["run.recompute=ffn"], 2),
        (["run.recompute=ffn", "parallel=tp2", "quant.groups=1", "moe.shared_expert_size=0"], 2),
        (["parallel=single", "parallel.expert_tensor=2"], 2),
        (["parallel=pp2", "parallel.expert=2", "run.global_batch_size=16"], 4),
        (["moe.score=sigmoid", "moe.expert_bias=true"], 2),
    ],
)
def test_validate_accepts(overrides, world_size):
    validate(compose([*SIZES, *overrides]), world_size)


def test_problems_returns_every_reason():
    config = compose(["parallel.tensor=3", "parallel.expert=3", "moe.router_topk=9"])
    keys = {problem.key for problem in problems(config, 4)}
    assert {"parallel.tensor", "parallel.expert", "moe.router_topk", "quant.groups", "world size"} <= keys


def test_problems_leaves_data_out():
    assert problems(compose(["data=files", "tokenizer=file"]), 2) == []
