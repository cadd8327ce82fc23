"""accelerate and restore: one instance only, reversible bit for bit, following its weights, refusing the rest."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import gc
import types
import weakref
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from decoder_cases import hf_model, random_ids, randomise
from torch import nn
from transformers_cases import LANGUAGE_MODELS, close, pair, same_state, state_of

CLASSES = (
    "GPTBigCodeModel",
    "GPTBigCodeForCausalLM",
    "GPTBigCodeForSequenceClassification",
    "GPTBigCodeForTokenClassification",
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "CodeGenModel",
    "CodeGenForCausalLM",
)


def fresh(cls: str = "GPT2LMHeadModel", seed: int = 3, **fixed: Any) -> Any:
    return copy.deepcopy(hf_model(seed, cls, **fixed))


@pytest.mark.parametrize("cls", CLASSES)
def test_restore_gives_back_every_bit(cls: str) -> None:
    model = fresh(cls)
    before = state_of(model)
    report = at.accelerate(model)
    ids = random_ids(model, 1, 6)
    model(ids)
    assert report.fast_calls == 1
    assert at.restore(model) > 0
    same_state(before, state_of(model))
    assert at.restore(model) == 0
    model(ids)
    assert report.fast_calls == 1


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_only_this_instance(cls: str) -> None:
    one, other = fresh(cls), fresh(cls)
    forwards = {module: type(module).forward for module in one.modules()}
    before = state_of(other)
    at.accelerate(one)
    same_state(before, state_of(other))
    for module, forward in forwards.items():
        assert type(module).forward is forward
    close(one(random_ids(one, 2, 5)).logits, other(random_ids(one, 2, 5)).logits)


def test_is_idempotent() -> None:
    model = fresh()
    first = at.accelerate(model)
    attributes = {key: value for key, value in model.transformer.__dict__.items() if key in ("forward", "_alula")}
    second = at.accelerate(model)
    assert attributes == {key: model.transformer.__dict__[key] for key in attributes}
    assert first.replaced == second.replaced
    model(random_ids(model, 1, 4))
    assert first.fast_calls == second.fast_calls == 1


def test_report_says_everything() -> None:
    model = fresh("GPT2DoubleHeadsModel")
    report = at.accelerate(model)
    text = str(report)
    blocks = len(model.transformer.h)
    assert f"{blocks} x GPT2Block in transformer" in text
    assert "output projection in lm_head" in text
    assert transformers.__version__ in text
    left = {item.where for item in report.left}
    assert left == {"transformer.wte", "transformer.wpe", "multiple_choice_head.summary"}
    expected = sum(p.numel() for block in model.transformer.h for p in block.parameters() if p.dim() == 2)
    assert report.packed_bytes >= 4 * (expected + model.lm_head.weight.numel())
    with_parameters = {
        name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    inside = {name for name in with_parameters if name.startswith(("transformer.h.", "transformer.ln_f", "lm_head"))}
    assert with_parameters == left | inside


def test_restore_frees_the_copies_while_the_report_lives() -> None:
    model = fresh()
    report = at.accelerate(model)
    packed = weakref.ref(model.transformer._alula.stack.engine)
    at.restore(model)
    gc.collect()
    assert packed() is None
    assert report.fast_calls == 0
    assert "GPT2Block" in str(report)


def test_accelerate_model_returns_the_model() -> None:
    model = fresh()
    assert at.accelerate_model(model) is model


# --- weights that change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_follows_weights(cls: str) -> None:
    model, plain = fresh(cls), fresh(cls)
    report = at.accelerate(model)
    ids = random_ids(model, 2, 6)

    def check() -> None:
        close(model(ids).logits, plain(ids).logits)

    check()
    other = fresh(cls)
    randomise(other, 99)
    for target in (model, plain):
        target.load_state_dict(other.state_dict())
    check()
    for target in (model, plain):  # in place, one tensor
        with torch.no_grad():
            next(p for name, p in target.named_parameters() if "mlp" in name and p.dim() == 2).mul_(-1.5)
            target.get_output_embeddings().weight.add_(0.25)
    check()
    for target in (model, plain):  # another Parameter
        norm = target.transformer.h[0].ln_1
        norm.weight = nn.Parameter(norm.weight.detach() * 2)
    check()
    for target in (model, plain):  # other tensors in place of all
        target.load_state_dict(
            {key: value.clone() for key, value in hf_model(3, cls).state_dict().items()}, assign=True
        )
        target.tie_weights()
    check()
    for target in (model, plain):  # another memory of one
        weight = next(p for name, p in target.named_parameters() if "c_proj" in name or "out_proj" in name)
        weight.data = weight.data.flip(0).contiguous()
    check()
    assert not report.plain_calls


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_data_written_aside_needs_refresh(cls: str) -> None:
    model, plain = fresh(cls), fresh(cls)
    at.accelerate(model)
    ids = random_ids(model, 1, 6)
    for target in (model, plain):
        for parameter in target.parameters():
            parameter.data.mul_(0.5)
    at.refresh(model)
    close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_follows_dtype(cls: str, low: torch.dtype) -> None:
    model, plain = fresh(cls), fresh(cls)
    at.accelerate(model)
    ids = random_ids(model, 2, 6)
    exact = plain(ids).logits
    model.to(low)
    ours = model(ids).logits
    theirs = plain.to(low)(ids).logits
    assert ours.dtype == theirs.dtype
    error = (theirs.float() - exact).abs().max()
    assert (ours.float() - exact).abs().max() <= 2 * error + 1e-2
    model.to(torch.float32)
    rounded = fresh(cls)  # CodeGen in 5.x rounds its angles, too, and keeps them so: compare with a model that did not
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(low))
    close(model(ids).logits, rounded(ids).logits)


def test_change_into_what_alula_cannot_run() -> None:
    model = fresh()
    at.accelerate(model)
    ids = random_ids(model, 1, 4)
    model.double()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"changed into what alula cannot run: .*float64.*restore"):
            model(ids)
    model.float()
    model(ids)
    model.double()
    at.restore(model)
    assert model(ids).logits.dtype == torch.float64


def test_modules_exchanged_afterwards() -> None:
    """Another block, another matrix, fewer blocks: followed; an adapter: said."""
    model, plain = fresh("GPT2LMHeadModel", 1, n_layer=3), fresh("GPT2LMHeadModel", 1, n_layer=3)
    report = at.accelerate(model)
    ids = random_ids(model, 1, 6)
    other = fresh("GPT2LMHeadModel", 1, n_layer=3)
    randomise(other, 5)
    for target in (model, plain):
        target.transformer.h[1] = copy.deepcopy(other.transformer.h[1])
    close(model(ids).logits, plain(ids).logits)
    for target in (model, plain):
        target.transformer.h[2].mlp.c_fc = copy.deepcopy(other.transformer.h[2].mlp.c_fc)
    close(model(ids).logits, plain(ids).logits)
    for target in (model, plain):
        target.transformer.h = target.transformer.h[:2]
    close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert not report.plain_calls

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 1

    model.transformer.h[0].mlp.c_proj = Adapter(model.transformer.h[0].mlp.c_proj)
    with pytest.raises(ValueError, match=r"changed into .*h\.0\.mlp\.c_proj is a .*Adapter.*restore"):
        model(ids)
    assert at.restore(model)
    assert model(ids, use_cache=False).logits.shape == (1, 6, model.config.vocab_size)


def test_pickled_models(tmp_path) -> None:
    model, plain = fresh(), fresh()
    at.accelerate(model)
    ids = random_ids(model, 1, 6)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    close(again(ids).logits, plain(ids).logits)
    report = at.accelerate(again)  # runs plain when it is loaded
    close(again(ids).logits, plain(ids).logits)
    assert report.fast_calls == 1
    at.restore(again)
    close(again(ids).logits, plain(ids).logits)


def test_shares_vectors() -> None:
    """Biases and norms are the model's own memory; the parameters are not copied."""
    model = fresh("GPT2LMHeadModel")
    at.accelerate(model)
    block = model.transformer.h[0]
    bound = model.transformer._alula.stack.blocks[0]
    assert bound.norm1_weight.data_ptr() == block.ln_1.weight.data_ptr()
    assert bound.proj_bias.data_ptr() == block.mlp.c_proj.bias.data_ptr()


# --- life beside other features -------------------------------------------------------------------------------------


def test_copies_and_saved_models(tmp_path) -> None:
    model, plain = fresh(), fresh()
    at.accelerate(model)
    ids = random_ids(model, 1, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.zero_()
    close(twin(ids).logits, plain(ids).logits)
    assert twin.transformer._alula is not model.transformer._alula
    assert twin.transformer._alula.fast == 1
    assert model.transformer._alula.fast == 0
    assert at.restore(twin) == 2
    twin.save_pretrained(tmp_path / "plain")
    at.accelerate(twin)
    twin.save_pretrained(tmp_path / "fast")
    saved = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("plain", "fast")]
    assert saved[0] == saved[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fast").eval()
    close(again(ids).logits, plain(ids).logits)


def test_hooks_inside_the_blocks_run() -> None:
    model = fresh()
    report = at.accelerate(model)
    seen = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="forward hook"):
        model(random_ids(model, 1, 4))
    assert seen == [1]
    assert report.plain_calls == {"a module inside the blocks has a forward hook": 1}
    assert "1 on transformers" in str(report)
    handle.remove()
    model(random_ids(model, 1, 4))
    assert report.fast_calls == 1
    outer = model.transformer.register_forward_hook(lambda *_: seen.append(2))
    model(random_ids(model, 1, 4))
    outer.remove()
    assert seen == [1, 2]
    assert report.fast_calls == 2


def test_an_argument_from_the_future() -> None:
    model, plain = fresh(), fresh()
    report = at.accelerate(model)
    ids = random_ids(model, 1, 4)
    with pytest.warns(UserWarning, match="tomorrow is not known to alula"):
        ours = model.transformer(ids, tomorrow=True)
    close(ours[0], plain.transformer(ids)[0])
    assert report.plain_calls


def test_decoder_inside_another_model() -> None:
    class Wrapper(transformers.PreTrainedModel):
        config_class = transformers.GPT2Config

        def __init__(self, config: Any, body: nn.Module) -> None:
            super().__init__(config)
            self.body = body

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.body(ids)[0]

    plain = fresh("GPT2Model")
    model = Wrapper(plain.config, copy.deepcopy(plain)).eval()
    report = at.accelerate(model)
    close(model(random_ids(plain, 1, 5)), plain(random_ids(plain, 1, 5))[0])
    assert report.fast_calls == 1


def test_names_keep_their_order() -> None:
    model, plain = fresh(), fresh()
    report = at.accelerate(model)
    ids = random_ids(model, 1, 6)
    positions = torch.arange(6)[None] + 1
    close(model.transformer(ids, position_ids=positions)[0], plain.transformer(ids, position_ids=positions)[0])
    close(model.transformer(ids, None)[0], plain.transformer(ids, None)[0])
    with pytest.raises(TypeError, match="two values"):
        model.transformer(ids, input_ids=ids)
    assert report.fast_calls == 2
    import inspect

    assert inspect.signature(model.transformer.forward) == inspect.signature(plain.transformer.forward)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(model: Any, match: str, error: type[Exception] = ValueError) -> None:
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match):
        at.accelerate(model)
    if before is not None:
        same_state(before, state_of(model))


def test_refuses_what_is_no_model() -> None:
    refused(nn.Linear(2, 2), "takes a transformers model", TypeError)
    refused("gpt2", "takes a transformers model", TypeError)


def test_refuses_unsupported_classes() -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    refused(transformers.BertModel(config).eval(), "BertModel is not supported; accepted: .*GPT-2, GPTBigCode, CodeGen")


def test_refuses_training() -> None:
    model = fresh().train()
    refused(model, r"training mode.*eval\(\)")
    at.accelerate(model.eval())
    model.train()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="training mode"):
        model(random_ids(model, 1, 4))
    with pytest.raises(RuntimeError, match="no dropout"):
        model(random_ids(model, 1, 4))


def test_gradients_in_evaluation() -> None:
    model, plain = fresh(), fresh()
    report = at.accelerate(model)
    ids = random_ids(model, 1, 4)
    with torch.enable_grad():
        out = model(ids, labels=ids)
        assert not out.logits.requires_grad
        embeds = model.transformer.wte(ids).detach().requires_grad_()
        with pytest.raises(RuntimeError, match="no backward"):
            model(inputs_embeds=embeds)
    close(out.loss[None], plain(ids, labels=ids).loss[None])
    assert report.fast_calls == 1


def test_refuses_compiled() -> None:
    model = fresh()
    refused(torch.compile(model), "accelerate it first")
    model.compile()
    with pytest.raises(ValueError, match="accelerate it first"):
        at.accelerate(model)


def test_refuses_peft() -> None:
    wrapper = type("PeftModelForCausalLM", (nn.Module,), {"__module__": "peft.peft_model"})()
    refused(wrapper, "merge_and_unload")
    model = fresh()
    model.peft_config = {"default": object()}
    refused(model, "merge_and_unload")


def test_refuses_adapters_inside() -> None:
    class Adapter(nn.Linear):
        pass

    model = fresh("GPTBigCodeForCausalLM")
    width = model.config.n_embd
    model.transformer.h[0].attn.c_proj = Adapter(width, width)
    refused(model, r"transformer: h\.0\.attn\.c_proj is a .*Adapter; accepted: Linear")


def test_refuses_devices() -> None:
    model = fresh()
    model.hf_device_map = {"transformer.wte": "cpu", "transformer.h": "cuda:0"}
    refused(model, "spread over devices")
    meta = fresh().to("meta")
    with pytest.raises(ValueError, match="on meta; accepted: cpu"):
        at.accelerate(meta)


def test_refuses_quantized() -> None:
    model = fresh()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"quantized by another library \(bitsandbytes\)"):
        at.accelerate(model)


def test_refuses_checkpointing_wrappers_and_parallel() -> None:
    model = fresh()
    model.transformer.gradient_checkpointing = True
    refused(model, "gradient checkpointing")
    refused(nn.DataParallel(fresh()), r"model\.module")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda m: setattr(m.transformer.h[0], "forward", types.MethodType(lambda self, x: x, m)), "forward method of"),
        (lambda m: setattr(m.transformer.h[0].mlp, "act", nn.ReLU6()), "h.0.mlp.act is .*ReLU6"),
        (lambda m: setattr(m.transformer, "ln_f", nn.RMSNorm(m.config.n_embd)), "ln_f is a .*RMSNorm"),
        (lambda m: m.transformer.h[0].mlp.half(), "dtype torch.float16"),
        (lambda m: m.transformer.h[0].register_parameter("gate", nn.Parameter(torch.ones(1))), "does not know"),
        (lambda m: setattr(m.transformer.h[0].attn, "layer_idx", 1), "layer_idx=1"),
        (lambda m: m.double(), "float64"),
    ],
)
def test_refuses_changed_blocks(change, match: str) -> None:
    model = fresh()
    change(model)
    with pytest.raises(ValueError, match=f"nothing in this GPT2LMHeadModel could be replaced: transformer: .*{match}"):
        at.accelerate(model)
    assert not any("_alula" in module.__dict__ for module in model.modules())


def test_refuses_a_head_size_without_kernels() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=20, n_head=2, n_layer=1, vocab_size=31)).eval()
    refused(model, "multiple of 8")


def test_another_class_of_block_is_told() -> None:
    class Special(transformers.models.gpt2.modeling_gpt2.GPT2Block):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = fresh()
    model.transformer.h[0].__class__ = Special
    with pytest.raises(ValueError, match=r"h\.0 is a .*Special, whose forward is not that of GPT2Block"):
        at.accelerate(model)


def test_truncated_models() -> None:
    """Fewer blocks than the configuration says, as people cut models down."""
    models = pair(1, "GPT2LMHeadModel", n_layer=3)
    plain, model = copy.deepcopy(models.plain), copy.deepcopy(models.plain)
    for target in (plain, model):
        target.transformer.h = target.transformer.h[:2]
    report = at.accelerate(model)
    ids = random_ids(model, 1, 5)
    close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert report.fast_calls == 1
