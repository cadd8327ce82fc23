"""BigBird's task heads: sequences, choices, tokens, answers to questions.

Alphabet: B batch, T tokens, C choices, E model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alula.config import BigBirdConfig
from alula.models.big_bird import BigBirdWithHead, BlockPlans
from alula.models.big_bird_blocks import BigBirdIntermediate, BigBirdOutput, layer_norm_op, stored
from alula.models.blocks import product
from alula.models.heads import choice_loss, sequence_classification_loss, span_loss, token_classification_loss
from alula.models.inputs import require_tensors
from alula.models.layers import Linear, Module
from alula.ops import ACTIVATIONS
from alula.outputs import (
    BigBirdForQuestionAnsweringModelOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

__all__ = [
    "BigBirdForMultipleChoice",
    "BigBirdForQuestionAnswering",
    "BigBirdForSequenceClassification",
    "BigBirdForTokenClassification",
]

_BANNED = 1e6  # subtracted from the logits of a question's tokens


class BigBirdClassificationHead(Module):
    """``out_proj(act(dense(x)))`` of the first token."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, dtype)
        self.out_proj = Linear(config.hidden_size, config.num_labels, dtype)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(product(x, *stored(self.dense), activation=self._activation))


class BigBirdForSequenceClassification(BigBirdWithHead):
    """``classifier`` over the first token."""

    optional_weights = ("classifier.",)

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.classifier = BigBirdClassificationHead(config, self.dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with logits [B, num_labels]. ``labels``: what ``config.problem_type`` asks
        for, see :func:`alula.models.heads.sequence_classification_loss`."""
        run = self.bert.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            block_plan=block_plan,
        )
        logits = self.classifier(run.first_tokens())
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutput(loss, logits, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdForMultipleChoice(BigBirdWithHead):
    """``classifier`` [1, E] over the pooled first token of every choice."""

    optional_weights = ("classifier.",)

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.classifier = Linear(config.hidden_size, 1, self.dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Inputs have a dimension of choices: ids, masks, types and positions [B, C, T], embeddings [B, C, T, E].
        Logits are [B, C]; ``labels``: int64 [B], the right choice."""
        require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        given = input_ids if inputs_embeds is None else inputs_embeds
        dims = 3 if inputs_embeds is None else 4
        if given is not None and given.dim() != dims:
            name, accepted = ("input_ids", "[B, C, T]") if inputs_embeds is None else ("inputs_embeds", "[B, C, T, E]")
            raise ValueError(f"{name} has shape {list(given.shape)}; accepted: {accepted}, C choices")
        flat = [
            value if value is None or value.dim() < 3 else value.flatten(0, 1)
            for value in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        run = self.bert.run(
            *flat,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            block_plan=block_plan,
        )
        logits = self.classifier(self.bert.pool(run)).view(given.shape[:2])
        loss = None if labels is None else choice_loss(logits, labels)
        output = MultipleChoiceModelOutput(loss, logits, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdForTokenClassification(BigBirdWithHead):
    """``classifier`` [num_labels, E] with bias, at every token."""

    optional_weights = ("classifier.",)

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.classifier = Linear(config.hidden_size, config.num_labels, self.dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with logits [B, T, num_labels]. ``labels``: int64 [B, T], -100: none."""
        run = self.bert.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            block_plan=block_plan,
        )
        logits = self.classifier(run.hidden)
        loss = None if labels is None else token_classification_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdQuestionAnsweringHead(Module):
    """An MLP with residual and layer norm, then ``qa_outputs`` [2, E]."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.intermediate = BigBirdIntermediate(config, dtype)
        self.output = BigBirdOutput(config.intermediate_size, config, dtype)
        self.qa_outputs = Linear(config.hidden_size, config.num_labels, dtype)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        x = product(hidden, *stored(self.intermediate.dense), activation=self._activation)
        weight, bias, norm_weight, norm_bias = self.output.bind()
        x = product(x, weight, bias, residual=hidden)
        return self.qa_outputs(layer_norm_op(x, norm_weight, norm_bias, self.output.LayerNorm.eps, None))


class BigBirdForQuestionAnswering(BigBirdWithHead):
    """``qa_classifier``: how likely each token is the answer's first, and its last. The input is
    ``[CLS] question [SEP] text [SEP]``; an answer in the question is ruled out."""

    optional_weights = ("qa_classifier.",)

    def __init__(
        self,
        config: BigBirdConfig,
        add_pooling_layer: bool = False,
        *,
        dtype: torch.dtype | None = None,
        init_weights: bool = True,
    ) -> None:
        config.num_labels = 2
        super().__init__(config, dtype, add_pooling_layer)
        self.num_labels = 2
        self.sep_token_id = config.sep_token_id
        self.qa_classifier = BigBirdQuestionAnsweringHead(config, self.dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        question_lengths: Tensor | None = None,
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
        block_plan: BlockPlans = None,
    ) -> BigBirdForQuestionAnsweringModelOutput | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with start_logits and end_logits [B, T].

        Args:
            question_lengths: int64 [B, 1] or [B], tokens up to and with the [SEP] after the question. Default: up to
                the first ``sep_token_id`` of ``input_ids``; with ``inputs_embeds`` no question is ruled out.
            token_type_ids: default, where the question's length is known: 0 for its tokens, 1 for all others.
            start_positions, end_positions: int64 [B] or [B, 1], for the loss; a position beyond T is left out.

        Raises ValueError for ids without a [SEP].
        """
        require_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, question_lengths=question_lengths)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and given.dim() >= 2 and given.numel():
            question_lengths = self._question_lengths(input_ids, question_lengths, *given.shape[:2])
        is_question = None
        if question_lengths is not None:
            is_question = torch.arange(given.shape[1], device=given.device) < question_lengths
            if token_type_ids is None:
                token_type_ids = (~is_question).long()
            is_question[:, 0] = False  # [CLS] may stand for "there is no answer"
        run = self.bert.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            block_plan=block_plan,
        )
        logits = self.qa_classifier(run.hidden)
        if is_question is not None:
            logits = logits - is_question.unsqueeze(2) * _BANNED
        start, end = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = BigBirdForQuestionAnsweringModelOutput(
            loss, start.contiguous(), end.contiguous(), self.bert.pool(run), run.hidden_states, run.attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()

    def _question_lengths(self, ids: Tensor | None, given: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """[B, 1], or None where nothing tells them."""
        if given is not None:
            if given.numel() != batch or given.dim() > 2 or given.dtype.is_floating_point:
                raise ValueError(
                    f"question_lengths has shape {list(given.shape)} and dtype {given.dtype}; accepted: int64 "
                    f"[{batch}, 1] or [{batch}]"
                )
            if bool(((given < 0) | (given > tokens)).any()):
                raise ValueError(
                    f"question_lengths holds {given.flatten().tolist()}; accepted: 0 to {tokens}, the tokens"
                )
            return given.reshape(batch, 1)
        if ids is None:
            return None
        if self.sep_token_id is None:
            raise ValueError("the configuration has no sep_token_id to find questions by; give question_lengths")
        is_sep = ids == self.sep_token_id
        without = (~is_sep.any(1)).nonzero()
        if len(without):
            raise ValueError(
                f"row {int(without[0])} of input_ids has no [SEP] (sep_token_id is {self.sep_token_id}) to end its "
                "question; write [CLS] question [SEP] text [SEP], or give question_lengths"
            )
        return is_sep.int().argmax(1, keepdim=True) + 1
