"""Self-speculation: draft several tokens with few loops, verify them together with all loops.

A round starts from a token x_0 that is not in the cache yet. The model drafts d_1..d_k one by one with r_d loops each
and keeps the states; then loops r_d + 1..r run once for all k positions, which gives the distributions p_1..p_k that
plain decoding at r loops would give. The draft's loops are the first loops of the verification: the keys of loops
1..r_d depend on nothing deeper, so nothing is computed twice but the coda and the head. Kept are d_1..d_m up to the
first draft that is refused, and in its place one token of the verification:

    greedy      d_j is kept if it is the most likely token under p_j
    sampling    d_j is kept with probability min(1, p_j(d_j) / q_j(d_j)), q_j the draft's distribution; the token in
                its place is drawn from max(0, p_j - q_j), normalised. The result is distributed as p (Leviathan et al.
                2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1)

In a batch all rows advance by the number of tokens of the row that keeps the fewest; what is cut off is drafted again,
independently of what was seen, so each row's distribution stays exact. Letters: B rows, k drafted tokens, H hidden
width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from cognexis.decoder.cache import CognexisCache
from cognexis.decoder.masks import build_masks
from cognexis.errors import InvalidConfigError
from cognexis.looping.options import LoopOptions, loop_count

DEFAULT_TOKENS = 4
_REFUSED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class SpeculativeDecoding:
    """A decoding loop for transformers' ``generate``.

    Attributes:
        draft_loops: loops of a draft.
        num_loops: loops of the verification, more than ``draft_loops``.
        num_tokens: tokens drafted per round.
        rounds: verifications so far.
        drafted: tokens drafted in rows that had not ended.
        accepted: how many of them were kept.
    """

    draft_loops: int
    num_loops: int
    num_tokens: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    _recorder: Any = field(default=None, repr=False)

    @classmethod
    def of_request(cls, model: Any, options: LoopOptions, draft_loops: Any, num_tokens: Any) -> "SpeculativeDecoding":
        """The loop for a request, or a reason why it cannot be.

        Raises:
            InvalidConfigError: numbers out of range, a mode that does not go with it, or a model whose attention needs
                keys that a draft must not leave behind.
        """
        if draft_loops is None:
            raise InvalidConfigError("speculative_tokens: needs speculative_draft_loops", path="speculative_tokens")
        draft_loops = loop_count("speculative_draft_loops", draft_loops)
        num_tokens = DEFAULT_TOKENS if num_tokens is None else loop_count("speculative_tokens", num_tokens)
        if options.mixes_depths:
            raise InvalidConfigError(
                "speculative_draft_loops: verification needs one fixed number of loops; leave out adaptive modes, "
                "loops by row and cache policies",
                path="speculative_draft_loops",
            )
        if draft_loops >= options.num_loops:
            raise InvalidConfigError(
                f"speculative_draft_loops={draft_loops}: must be below num_loops={options.num_loops}",
                path="speculative_draft_loops",
                value=draft_loops,
            )
        if model.config.input_injection == "attention_memory" or model.config.global_tokens:
            raise InvalidConfigError(
                "speculative_draft_loops: attention memory and global tokens keep keys that a draft cannot take back",
                path="speculative_draft_loops",
            )
        return cls(draft_loops, options.num_loops, num_tokens)

    def facts(self) -> dict[str, Any]:
        """What the request's diagnostics say about it."""
        return {
            "draft_loops": self.draft_loops,
            "tokens_per_round": self.num_tokens,
            "rounds": self.rounds,
            "acceptance_rate": self.accepted / self.drafted if self.drafted else None,
        }

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Continue ``input_ids`` ``[B, T]`` until every row has ended; transformers calls this."""
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        self._recorder = loop_recorder = model_kwargs.get("loop_recorder")
        for name in _REFUSED:
            if getattr(generation_config, name, None):
                raise InvalidConfigError(f"{name}: is not returned with speculative_draft_loops", path=name)
        if (generation_config.num_beams or 1) > 1:
            raise InvalidConfigError("num_beams: beams do not go with speculative_draft_loops", path="num_beams")
        if not isinstance(cache, CognexisCache) or cache.cache_type == "static":
            raise InvalidConfigError("past_key_values: speculative_draft_loops needs a dynamic CognexisCache")
        if model_kwargs.get("inputs_embeds") is not None or int(cache.get_seq_length()) > 0:
            raise InvalidConfigError("speculative_draft_loops: starts from input_ids and an empty cache")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if input_ids.shape[1] > 1:
            model.model(
                input_ids=input_ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                num_loops=self.num_loops, allow_extrapolation=True,
            )  # fmt: skip
            self._count(self.num_loops, len(input_ids))
        else:
            cache.bind(self.num_loops, 1)
        cache.activate_past_recording()
        limit = stopping_criteria.max_length
        while bool(unfinished.any()):
            room = self.num_tokens if limit is None else min(self.num_tokens, limit - input_ids.shape[1])
            new, num_kept = self._round(
                model, input_ids, mask, cache, room, logits_processor, generation_config, unfinished
            )
            for token in new.unbind(dim=1):
                if generation_config._pad_token_tensor is not None:
                    token = torch.where(unfinished, token, generation_config._pad_token_tensor)
                input_ids = torch.cat((input_ids, token[:, None]), dim=1)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                if streamer is not None:
                    streamer.put(token.cpu())
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                if loop_recorder is not None:
                    loop_recorder.append(torch.full_like(token, self.num_loops))
                if not bool(unfinished.any()):
                    break
            cache.crop(num_kept - room)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            sequences: Any = input_ids
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return input_ids

    def _round(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor,
        cache: CognexisCache,
        num_tokens: int,
        logits_processor: Any,
        generation_config: Any,
        unfinished: Tensor,
    ) -> tuple[Tensor, int]:
        """Draft and verify; returns the new tokens ``[B, n]`` and how many of the processed ones stay, also n."""
        body, samples = model.model, bool(generation_config.do_sample)
        mask = torch.nn.functional.pad(mask, (0, num_tokens - 1), value=1)
        positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)[:, -num_tokens:]
        like = body.embed_tokens.weight.new_empty(len(input_ids), num_tokens, body.config.hidden_size)
        verify_masks = build_masks(body.config, like, mask, cache, positions)  # before the draft fills any slot
        drafts, states, starts, draft_probs = [input_ids[:, -1]], [], [], []
        past = mask.shape[1] - num_tokens
        for step in range(num_tokens):
            h0, state, logits = self._draft(
                model, drafts[-1], mask[:, : past + step + 1], positions[:, step : step + 1], cache
            )
            states.append(state)
            starts.append(h0)
            prefix = torch.cat((input_ids, *(d[:, None] for d in drafts[1:])), dim=1)
            scores = logits_processor(prefix, logits.float())
            probabilities = scores.softmax(dim=-1)
            token = torch.multinomial(probabilities, 1)[:, 0] if samples else scores.argmax(dim=-1)
            drafts.append(token)
            draft_probs.append(probabilities)
        _crop_coda(cache, body.config, -num_tokens)
        logits = self._verify(model, torch.cat(starts, 1), torch.cat(states, 1), verify_masks, positions, cache)
        drafted = torch.stack(drafts[1:], dim=1)
        chosen, is_kept = [], []
        for step in range(num_tokens):
            prefix = torch.cat((input_ids, drafted[:, :step]), dim=1)
            scores = logits_processor(prefix, logits[:, step].float())
            kept, instead = _judge(scores, drafted[:, step], draft_probs[step], samples)
            is_kept.append(kept)
            chosen.append(instead)
        run = torch.stack(is_kept, dim=1).long().cumprod(dim=1)  # 1 up to the first refusal
        lengths = (run.sum(dim=1) + 1).clamp(max=num_tokens).masked_fill(~unfinished, num_tokens)
        length = int(lengths.min())
        tokens = torch.where(run.bool(), drafted, torch.stack(chosen, dim=1))[:, :length]
        self.rounds += 1
        self.drafted += num_tokens * int(unfinished.sum())
        self.accepted += int((run[:, :length] * unfinished[:, None]).sum())
        return tokens, length

    def _draft(
        self, model: Any, token: Tensor, mask: Tensor, position: Tensor, cache: CognexisCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prelude output and state ``[B, 1, H]`` of ``token`` ``[B]`` after the draft, and logits ``[B, V]``."""
        body = model.model
        embeddings = body.embed(token[:, None], None)
        masks = build_masks(body.config, embeddings, mask, cache, position)
        shared = {
            "position_embeddings": body.rotary_emb(embeddings, position_ids=position),
            "position_ids": position,
            "past_key_values": cache,
        }
        h0 = body.prelude(embeddings, masks=masks, **shared)
        state = body.recurrent(h0, self.draft_loops, masks=masks, **shared).hidden_states
        logits = model.lm_head(body.final_norm(body.coda(state, masks=masks, **shared)))
        self._count(self.draft_loops, len(token))
        return h0, state, logits[:, -1]

    def _verify(
        self, model: Any, h0: Tensor, state: Tensor, masks: dict[str, Any], positions: Tensor, cache: CognexisCache
    ) -> Tensor:
        """Logits ``[B, k, V]`` after all loops, continuing from the drafts' states ``[B, k, H]``."""
        body = model.model
        shared = {
            "position_embeddings": body.rotary_emb(state, position_ids=positions),
            "position_ids": positions,
            "past_key_values": cache,
        }
        memories = [None] * len(body.recurrent.blocks)
        for loop_index in range(self.draft_loops, self.num_loops):
            state, _ = body.recurrent.loop(state, h0, loop_index, masks, memories, **shared)
        self._count(self.num_loops - self.draft_loops, len(state))
        return model.lm_head(body.final_norm(body.coda(state, masks=masks, **shared)))

    def _count(self, loops: int, rows: int) -> None:
        if self._recorder is not None:
            self._recorder.begin_pass(rows, loops)


def _judge(scores: Tensor, draft: Tensor, draft_probabilities: Tensor, samples: bool) -> tuple[Tensor, Tensor]:
    """Whether each draft ``[B]`` is kept under the verification's scores ``[B, V]``, and the token in its place."""
    if not samples:
        best = scores.argmax(dim=-1)
        return best == draft, best
    probabilities = scores.softmax(dim=-1)
    at = draft[:, None]
    ratio = probabilities.gather(1, at) / draft_probabilities.gather(1, at)
    kept = (torch.rand_like(ratio) < ratio)[:, 0]
    rest = (probabilities - draft_probabilities).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, probabilities)  # equal up to rounding: never refused
    return kept, torch.multinomial(rest, 1)[:, 0]


def _crop_coda(cache: CognexisCache, config: Any, tokens: int) -> None:
    """Take back the coda's keys of a draft: they were made from shallow states."""
    first = config.num_prelude_blocks
    for layer in cache.layers[first : first + config.num_coda_blocks]:
        layer.crop(tokens)
