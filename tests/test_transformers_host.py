"""The releases of transformers that alula works with, and the library's own ways of running a model."""
# ruff: noqa: E402

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers import versions
from decoder_cases import random_ids
from transformers_cases import close, pair


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(text: str) -> None:
        monkeypatch.setattr(versions, "VERSION", text)
        versions.check.cache_clear()

    yield pretend
    versions.check.cache_clear()


def test_the_installed_release_is_probed(version: Any) -> None:
    assert versions.problems() == []
    version("6.1.0")
    versions.check()  # a newer one that still has everything works


def test_too_old(version: Any) -> None:
    version("4.49.1")
    with pytest.raises(ImportError, match=r"transformers 4\.49\.1 is too old.*4\.57"):
        versions.check()


def test_a_newer_release_that_changed(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version("7.0.0.dev0")
    monkeypatch.setitem(versions._RELIED_ON, "cache_utils", {"Cache": ("blocks",), "Gone.update": ()})
    with pytest.raises(RuntimeError, match=r"transformers 7\.0\.0\.dev0 .*no parameter 'blocks'.*has no Gone\.update"):
        versions.check()
    with pytest.raises(RuntimeError, match=r"7\.0\.0\.dev0"):
        at.accelerate(pair(2).plain)


def test_a_newer_release_whose_objects_changed(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only an object of a class has is looked for, too."""
    from alula.integrations.transformers import cache

    class Renamed(cache.EncoderDecoderCache):
        def __init__(self, *caches: Any) -> None:
            super().__init__(*caches)
            del self.is_updated

    version("7.0.0")
    monkeypatch.setattr(cache, "EncoderDecoderCache", Renamed)
    with pytest.raises(RuntimeError, match=r"transformers 7\.0\.0 .*EncoderDecoderCache has no is_updated"):
        versions.check()


def test_alula_itself_never_imports_transformers() -> None:
    code = "import sys, alula; alula.GPT2Model; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import alula.integrations.transformers\nexcept ImportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'alula[transformers]'" in said


def test_importing_registers_one_name() -> None:
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
        "before = set(attention.valid_keys()), set(masks.valid_keys())\n"
        "import alula.integrations.transformers\n"
        "print(set(attention.valid_keys()) - before[0], set(masks.valid_keys()) - before[1])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["{'alula'}", "{'alula'}"]


def tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w3", eos_token="w2")
    made.padding_side = "left"
    return made


def test_text_generation_pipeline() -> None:
    models = pair(2, "GPT2LMHeadModel")
    words = tokenizer(models.plain.config.vocab_size)
    prompts = ["w5 w6 w7", "w9", "w11 w12 w13 w14"]
    said = []
    for model in models[:2]:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=words, device="cpu")
        said.append(pipe(prompts, max_new_tokens=6, do_sample=False, batch_size=3))
    assert said[0] == said[1]
    models.prove()


def test_classification_pipeline() -> None:
    models = pair(3, "GPT2ForSequenceClassification")
    words = tokenizer(models.plain.config.vocab_size)
    words.padding_side = "right"
    results = []
    for model in models[:2]:
        pipe = transformers.pipeline("text-classification", model=model, tokenizer=words, device="cpu")
        results.append(pipe(["w5 w6 w7", "w9 w4"], batch_size=2))
    for one, other in zip(*results, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    models.prove()


def test_accelerate_model_inside_a_pipeline() -> None:
    models = pair(2, "GPT2LMHeadModel")
    words = tokenizer(models.plain.config.vocab_size)
    pipe = transformers.pipeline(
        "text-generation", model=at.accelerate_model(models.fast), tokenizer=words, device="cpu"
    )
    assert pipe("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w5 w6")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs the accelerate library")
def test_trainer_evaluates(tmp_path: Any) -> None:
    models = pair(2, "GPT2LMHeadModel")
    rows = [{"input_ids": row, "labels": row} for row in random_ids(models.plain, 5, 8)]
    losses = []
    for model in models[:2]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True
        )
        trainer = transformers.Trainer(model=model, args=arguments, eval_dataset=rows)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    models.prove()
    trainer = transformers.Trainer(model=models.fast, args=arguments, train_dataset=rows)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="training mode"):
        trainer.train()
    models.fast.eval()


def test_data_types_of_inputs() -> None:
    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 2, 5)
    for mask in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int32)):
        close(models.fast(ids, attention_mask=mask).logits, models.plain(ids, attention_mask=mask).logits)
    close(models.fast(ids.int()).logits, models.plain(ids.int()).logits)
