"""GPT-2: the models. Matrices lie in its checkpoints as Conv1D has them, (in, out)."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from alula.config import GPT2Config
from alula.models.decoder import DecoderPreTrainedModel, DecoderWithHead
from alula.models.gpt import GPTForCausalLM, GPTForSequenceClassification, GPTForTokenClassification, GPTModel
from alula.models.heads import normed_linear, span_loss
from alula.models.layers import Conv1D, Linear
from alula.outputs import QuestionAnsweringModelOutput

__all__ = [
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2PreTrainedModel",
]


class GPT2PreTrainedModel(DecoderPreTrainedModel):
    """What the classes share: configuration, old buffers."""

    config: GPT2Config
    config_class = GPT2Config
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")
    residual_projections = ("c_proj.weight",)


class GPT2Model(GPTModel, GPT2PreTrainedModel):
    """The blocks without a head."""

    dense = Conv1D


class GPT2LMHeadModel(GPTForCausalLM, GPT2PreTrainedModel):
    """Language model: logits over the vocabulary, from the embedding table where ``tie_word_embeddings``."""

    model_class = GPT2Model


class GPT2ForSequenceClassification(GPTForSequenceClassification, GPT2PreTrainedModel):
    """``score`` [num_labels, E] at the last token that is not ``pad_token_id``."""

    model_class = GPT2Model


class GPT2ForTokenClassification(GPTForTokenClassification, GPT2PreTrainedModel):
    """``classifier`` [num_labels, E] with bias, at every token."""

    model_class = GPT2Model


class GPT2ForQuestionAnswering(DecoderWithHead, GPT2PreTrainedModel):
    """``qa_outputs`` [2, E] with bias: how likely each token is the answer's first, and its last."""

    model_class = GPT2Model
    optional_weights = ("qa_outputs.",)

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.qa_outputs = Linear(config.n_embd, 2, self.dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """As :meth:`GPT2Model.forward`, with start_logits and end_logits [B, T].

        ``start_positions`` and ``end_positions``: int64 [B], for the loss; a position beyond T is left out.
        """
        run = self._run(
            input_ids,
            None,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask,
            False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        start, end = normed_linear(run.hidden, self.transformer.final_norm(), self.qa_outputs).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(
            loss, start.contiguous(), end.contiguous(), run.hidden_states, run.attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()
