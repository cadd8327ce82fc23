"""BigBird over its vocabulary: masked and causal language models, and the two heads it was pre-trained with.

Alphabet: B batch, T tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alula.cache import KVCache
from alula.config import BigBirdConfig
from alula.generation import GenerationMixin
from alula.models.big_bird import BigBirdWithHead, BlockPlans
from alula.models.big_bird_blocks import layer_norm_op
from alula.models.blocks import product
from alula.models.heads import LMHead, causal_lm_loss, choice_loss, select_positions, token_classification_loss
from alula.models.inputs import whole_or_nothing
from alula.models.layers import Embedding, LayerNorm, Linear, Module, WeightModule
from alula.ops import ACTIVATIONS
from alula.outputs import BigBirdForPreTrainingOutput, CausalLMOutputWithCrossAttentions, MaskedLMOutput

__all__ = ["BigBirdForCausalLM", "BigBirdForMaskedLM", "BigBirdForPreTraining"]


class BigBirdDecoder(LMHead):
    """Output projection [V, E]. Tied, it has neither weight nor bias of its own; otherwise it has both."""

    def __init__(self, width: int, vocab_size: int, dtype: torch.dtype, tied_to: Embedding | None = None) -> None:
        super().__init__(width, vocab_size, dtype, tied_to, bias=tied_to is None)

    def with_vocabulary(self, size: int, tied_to: Embedding | None = None) -> BigBirdDecoder:
        """A head like this one for ``size`` tokens, without values."""
        return BigBirdDecoder(self.in_features, size, self.dtype, tied_to)


class BigBirdTransform(Module):
    """``LayerNorm(act(dense(x)))``."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, dtype)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        dense = self.dense
        x = product(x, dense.stored("weight"), dense.stored_bias(), activation=self._activation)
        norm = self.LayerNorm
        return layer_norm_op(x, norm.stored("weight"), norm.stored("bias"), norm.eps, None)


class BigBirdPredictions(WeightModule):
    """Logits over the vocabulary. ``bias`` [V] is the output projection's where that is tied, and idle where not."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype, words: Embedding) -> None:
        super().__init__({"bias": (config.vocab_size,)}, (), dtype)
        self.transform = BigBirdTransform(config, dtype)
        tied_to = words if config.tie_word_embeddings else None
        self.decoder = BigBirdDecoder(config.hidden_size, config.vocab_size, dtype, tied_to)

    def forward(self, hidden: Tensor) -> Tensor:
        decoder = self.decoder
        bias = self.stored("bias") if decoder.is_tied else decoder.stored("bias")
        return product(self.transform(hidden), decoder.stored("weight"), bias)

    def resize_bias(self, bias: Tensor) -> None:
        """Takes a bias of another length."""
        self.shapes["bias"] = tuple(bias.shape)
        self.write("bias", bias)


class BigBirdHeads(Module):
    """``predictions``, and for pre-training ``seq_relationship`` [2, E] over the pooled first token."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype, words: Embedding, *, with_pairs: bool) -> None:
        super().__init__()
        self.predictions = BigBirdPredictions(config, dtype, words)
        if with_pairs:
            self.seq_relationship = Linear(config.hidden_size, 2, dtype)


class BigBirdLanguageModel(BigBirdWithHead):
    """What the three classes share: ``cls``, whose output projection may be tied to the table of words."""

    optional_weights = ("cls.",)

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype | None, *, with_pairs: bool = False) -> None:
        super().__init__(config, dtype)
        words = self.bert.embeddings.word_embeddings
        self.cls = BigBirdHeads(config, words.dtype, words, with_pairs=with_pairs)

    def tied_aliases(self) -> dict[str, str]:
        if not self.cls.predictions.decoder.is_tied:
            return {}
        return {
            "cls.predictions.decoder.bias": "cls.predictions.bias",
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        }

    def get_output_embeddings(self) -> LMHead:
        return self.cls.predictions.decoder

    def _place_output_embeddings(self, head: LMHead) -> None:
        predictions = self.cls.predictions
        predictions.resize_bias(self._resized(predictions.read("bias"), head.out_features, True))
        predictions.decoder = head

    def set_output_embeddings(self, value: nn.Module | Tensor) -> None:
        """Gives the output projection weights [V, E] (and a bias, if a module with one is given) of its own; a tied
        model becomes untied, and its configuration says so."""
        predictions = self.cls.predictions
        bias = predictions.read("bias") if predictions.decoder.is_tied else predictions.decoder.read("bias")
        if isinstance(value, nn.Module) and getattr(value, "bias", None) is not None:
            bias = value.bias.detach().to(self.dtype)
        table = self._as_table(value)
        if len(table) != self.config.vocab_size or len(bias) != len(table):
            raise ValueError(
                f"output embeddings have {len(table)} rows and {len(bias)} biases, the vocabulary "
                f"{self.config.vocab_size}"
            )
        head = BigBirdDecoder(table.shape[1], len(table), self.dtype)
        head.format = predictions.decoder.weight_format
        head.write("weight", table)
        head.write("bias", bias)
        predictions.write("bias", bias)
        predictions.decoder = head
        self.config.tie_word_embeddings = False


class BigBirdForMaskedLM(BigBirdLanguageModel):
    """Logits of what each token was before some were masked."""

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        if init_weights:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
        logits_to_keep: int | Tensor = 0,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with logits [B, T, V].

        Args:
            labels: int64 [B, T], the true tokens; -100 is left out.
            logits_to_keep: as :func:`alula.models.heads.select_positions` takes it; not with labels.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position; leave logits_to_keep out")
        run = self.bert.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            None,
            False,
            head_mask,
            output_attentions,
            output_hidden_states,
            block_plan,
        )
        logits = self.cls.predictions(select_positions(run.hidden, logits_to_keep))
        loss = None if labels is None else token_classification_loss(logits, labels)
        output = MaskedLMOutput(loss, logits, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdForPreTraining(BigBirdLanguageModel):
    """The masked language model, and whether a second text follows the first."""

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype, with_pairs=True)
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
        next_sentence_label: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> BigBirdForPreTrainingOutput | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with prediction_logits [B, T, V] and seq_relationship_logits [B, 2].

        ``labels``: int64 [B, T], -100 is left out. ``next_sentence_label``: int64 [B], 0: the second text follows, 1:
        it does not; its loss is added to that of ``labels``, and without those there is none.
        """
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
        logits, pairs = self.cls.predictions(run.hidden), self.cls.seq_relationship(self.bert.pool(run))
        loss = None if labels is None else token_classification_loss(logits, labels)
        if next_sentence_label is not None and loss is not None:
            loss = loss + choice_loss(pairs, next_sentence_label, "next_sentence_label")
        output = BigBirdForPreTrainingOutput(loss, logits, pairs, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdForCausalLM(GenerationMixin, BigBirdLanguageModel):
    """Logits of the next token. A decoder (``is_decoder=True``) sees the tokens before; an encoder sees all of them
    and cannot generate."""

    def __init__(self, config: BigBirdConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        if init_weights:
            self.init_weights()

    def generate(self, *args: Any, **options: Any) -> Tensor:
        self._check_decoder()
        return super().generate(*args, **options)

    generate.__doc__ = GenerationMixin.generate.__doc__

    def stream(self, *args: Any, **options: Any) -> Any:
        self._check_decoder()
        return super().stream(*args, **options)

    stream.__doc__ = GenerationMixin.stream.__doc__

    def _check_decoder(self) -> None:
        if not self.config.is_decoder:
            raise ValueError("this model is an encoder: it cannot generate; make it with is_decoder=True")

    def decode_step(
        self, tokens: Tensor, position_ids: Tensor, slots: Tensor, lengths: Tensor, cache: KVCache
    ) -> Tensor:
        """As :meth:`alula.models.decoder.DecoderWithHead.decode_step`."""
        return self.cls.predictions(self.bert.run_step(tokens, position_ids, slots, lengths, cache))

    @whole_or_nothing
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """As :meth:`BigBirdModel.forward`, with logits [B, T', V].

        Args:
            labels: int64, the shape of the ids: each position's logits are scored against the next label, -100 left
                out. ``shift_labels`` are scored unshifted.
            logits_to_keep: 0 for logits of all positions, n for the last n only, or a tensor of positions.
            num_items_in_batch: divides the loss in place of the number of labels.
        """
        run = self.bert.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            head_mask,
            output_attentions,
            output_hidden_states,
            block_plan,
        )
        logits = self.cls.predictions(select_positions(run.hidden, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithCrossAttentions(
            loss, logits, run.cache, run.hidden_states, run.attentions, run.cross_attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()
