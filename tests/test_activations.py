"""Every activation that transformers names: what it means, in every family of models, and what is refused."""

import copy
from typing import Any

import alula
import alula.integrations.transformers as at
import big_bird_cases
import decoder_cases
import pytest
import torch
import transformers
from alula import ops
from alula.activations import FORMULAS, activate
from alula.testing import hostile, quantized, reference
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor, nn
from transformers.activations import ACT2FN

REFUSED = ("prelu", "xielu")
NAMES = [name for name in ACT2FN if name not in REFUSED]
FAMILIES = ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "CodeGenForCausalLM")
each_name = pytest.mark.parametrize("name", NAMES)
each_function = pytest.mark.parametrize("activation", list(FORMULAS))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.isfinite().all()
    assert decoder_cases.worst(ours, theirs) <= decoder_cases.TOLERANCE


@each_name
def test_a_name_means_what_it_means_in_transformers(name: str) -> None:
    x = torch.cat([torch.linspace(-60, 60, 24001), torch.tensor([0.0, -0.0, torch.nan, torch.inf])]).double()
    torch.testing.assert_close(activate(x, name), ACT2FN[name](x), rtol=1e-6, atol=1e-9, equal_nan=True)


@each_name
@pytest.mark.parametrize("cls", FAMILIES)
def test_decoders(cls: str, name: str) -> None:
    plain = decoder_cases.hf_model(8, cls, activation_function=name, n_embd=64, n_head=4, n_inner=37)
    model = decoder_cases.alula_model(plain)
    ids = decoder_cases.random_ids(model, 2, 9)
    expected = plain(ids).logits
    close(model(ids).logits, expected)
    close(model(ids[:1]).logits, expected[:1])  # few rows: one call for all blocks, in a team
    fast = copy.deepcopy(plain)
    report = at.accelerate(fast)
    close(fast(ids).logits, expected)
    assert (report.fast_calls, report.plain_calls) == (1, {})


@each_name
@pytest.mark.parametrize("cls", ["BigBirdForPreTraining", "BigBirdForSequenceClassification"])
def test_big_bird(cls: str, name: str) -> None:
    """The transform before the vocabulary and the head of a classifier have the same activation as the blocks."""
    plain = big_bird_cases.hf_model(3, cls, hidden_act=name, num_random_blocks=1, block_size=16)
    model = big_bird_cases.alula_model(plain)
    for tokens in (19, big_bird_cases.switch(model.config) + 30):
        ids = big_bird_cases.random_ids(model, 2, tokens)
        plain = big_bird_cases.fresh(plain)
        theirs, ours = plain(ids).to_tuple(), model(ids).to_tuple()
        assert len(ours) == len(theirs)
        for mine, want in zip(ours, theirs, strict=True):
            close(mine, want)
    fast = copy.deepcopy(big_bird_cases.fresh(plain))
    report = at.accelerate(fast)
    close(fast(ids)[0], theirs[0])
    assert (report.fast_calls, report.plain_calls) == (1, {})


@each_name
@pytest.mark.parametrize("projected", [True, False])
def test_summary_of_double_heads(name: str, projected: bool) -> None:
    options = {"summary_activation": name, "summary_use_proj": projected, "n_embd": 48, "n_head": 3}
    plain = decoder_cases.hf_model(3, "GPT2DoubleHeadsModel", **options)
    model = decoder_cases.alula_model(plain)
    ids = torch.randint(4, model.config.vocab_size, (2, 3, 7))
    close(model(ids).mc_logits, plain(ids).mc_logits)


# --- kernels ---------------------------------------------------------------------------------------------------------


@each_function
def test_linear_and_qkv_projection_have_the_same_bits(activation: str, dtype: torch.dtype, isa: str) -> None:
    """Six have kernels that hold them, the others run over memory; behind query, key and value all run over memory."""
    features, width = 45, 40
    x, weight = torch.randn(2, 3, width).to(dtype), torch.randn(3 * 8 + features, width).to(dtype)
    bias = torch.randn(len(weight)).to(dtype)
    mlp = torch.empty(2, 3, features, dtype=dtype)
    ops.qkv_projection(
        x,
        ops.pack(weight),
        bias,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        kv_cache=torch.zeros(2, 1, 3, 16, dtype=dtype),
        positions=torch.arange(3, dtype=torch.int32).repeat(2, 1),
        mlp=mlp,
        mlp_activation=activation,
    )
    assert_equal_bits(mlp, ops.linear(x, ops.pack(weight[24:]), bias[24:], activation=activation))


@each_function
def test_bits_depend_on_no_other_row_or_thread(activation: str, dtype: torch.dtype, isa: str, threads: None) -> None:
    x, packed = torch.randn(30, 40).to(dtype), ops.pack(torch.randn(203, 40).to(dtype))
    options = {"activation": activation, "bias": torch.randn(203).to(dtype)}
    torch.set_num_threads(1)
    whole = ops.linear(x, packed, **options)
    torch.set_num_threads(3)
    assert_equal_bits(ops.linear(x, packed, **options), whole)
    for rows in (slice(0, 1), slice(7, 9), slice(11, 24)):
        assert_equal_bits(ops.linear(x[rows], packed, **options), whole[rows])


@each_function
def test_with_everything_around_it(activation: str, dtype: torch.dtype, isa: str) -> None:
    """Layout in memory, and a residual that is added after the activation."""
    x, packed = torch.randn(5, 24).to(dtype), ops.pack(torch.randn(50, 24).to(dtype))
    options = {"norm_weight": torch.randn(24).to(dtype), "bias": torch.randn(50).to(dtype)}
    residual = torch.randn(5, 50).to(dtype)
    alone = ops.linear(x, packed, activation=activation, **options)
    both = ops.linear(x, packed, activation=activation, residual=residual, **options)
    if dtype == torch.float32:
        assert_equal_bits(both, alone + residual)
    for place in hostile.LAYOUTS.values():
        placed = {key: place(value) for key, value in options.items()}
        assert_equal_bits(ops.linear(place(x), packed, activation=activation, residual=place(residual), **placed), both)


@pytest.mark.parametrize("activation", ["sigmoid", "laplace", "sqrtsoftplus"])
def test_what_is_not_there_stays_zero(activation: str, dtype: torch.dtype, isa: str) -> None:
    """Panels of weights are padded with zeros, of which these make something else: no product may see that."""
    x, first, second = (torch.randn(*shape).to(dtype) for shape in ((3, 17), (37, 17), (5, 37)))
    y = ops.linear(x, ops.pack(first), activation=activation)
    budget = reference.same_dtype(reference.linear, y, second)
    assert_close(ops.linear(y, ops.pack(second)), reference.linear(y, second), budget_from=budget, magnitude=10)


@each_function
def test_opcheck(activation: str) -> None:
    weight = ops.pack(torch.randn(40, 24)).data
    args = (torch.randn(3, 24), weight, 40, None, None, None, 1e-5, ops.ACTIVATIONS[activation], None)
    torch.library.opcheck(torch.ops.alula.linear, args)


@each_function
def test_steepest_slopes(activation: str) -> None:
    x = torch.linspace(-30, 30, 600001, dtype=torch.float64)
    y = FORMULAS[activation](x)
    change, step = (y[1:] - y[:-1]).abs(), (x[1:] - x[:-1]).abs()
    assert (change <= quantized.through_activation(step, x[:-1], activation) * (1 + 1e-9) + 1e-14).all()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFUSED, "gelo", ""])
def test_other_names(name: str) -> None:
    """Errors list what is accepted, and say why transformers' other two are not."""
    words = rf"'{name}'.*accepted: .*gelu_10, .*hardswish, .*sqrtsoftplus, .*tanh \(prelu and xielu have trained param"
    with pytest.raises(ValueError, match=words):
        ops.linear(torch.zeros(1, 8), ops.pack(torch.zeros(4, 8)), activation=name)
    for config, key in (
        (alula.GPT2Config, "activation_function"),
        (alula.GPT2Config, "summary_activation"),
        (alula.GPTBigCodeConfig, "activation_function"),
        (alula.CodeGenConfig, "activation_function"),
        (alula.BigBirdConfig, "hidden_act"),
    ):
        with pytest.raises(ValueError, match=key + "=" + words):
            config(**{key: name})


@pytest.mark.parametrize("name", REFUSED)
def test_accelerate_says_why(name: str) -> None:
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=31, activation_function=name)
    with pytest.raises(ValueError, match=r"could be replaced: .*trained parameters of their own"):
        at.accelerate(transformers.GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize(
    "name, module",
    [
        ("leaky_relu", nn.LeakyReLU(0.2)),
        ("gelu_10", type(ACT2FN["gelu_10"])(-1.0, 1.0)),
        ("relu6", nn.ReLU()),
    ],
)
def test_accelerate_looks_at_the_module(name: str, module: Any) -> None:
    model = copy.deepcopy(decoder_cases.hf_model(8, "GPT2LMHeadModel", activation_function=name, n_embd=32, n_head=2))
    model.transformer.h[0].mlp.act = module
    with pytest.raises(ValueError, match=rf"h\.0\.mlp\.act is \w.*\(.*\), the configuration says {name}"):
        at.accelerate(model)
