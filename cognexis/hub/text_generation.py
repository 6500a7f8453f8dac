"""Generate text from a checkpoint folder, piece by piece, as the command line does."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cognexis.artifacts.run_config import apply_overrides, load_run_config, loop_keywords_of, run_config_of_checkpoint
from cognexis.checkpoints.metadata import RESOLVED_FILE
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.match import check_tokenizer_match


@dataclass(frozen=True)
class TextRequest:
    """What to generate.

    Attributes:
        checkpoint: folder of a saved model with its tokenizer.
        prompt: the text, or with ``chat`` the user's message.
        chat: format the prompt with the chat template.
        overrides: run-time settings such as "inference.max_loops=4" or "inference.sampling.temperature=0".
        seed: of the sampling.
        verify: see ``from_pretrained``.
        allow_tokenizer_mismatch: run with a tokenizer that the model was not trained with.
        device: where to run; None takes CUDA when there is one.
    """

    checkpoint: Path
    prompt: str
    chat: bool = False
    overrides: tuple[str, ...] = ()
    num_loops: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    verify: str | None = None
    allow_tokenizer_mismatch: bool = False
    device: str | None = None
    config_file: Path | None = field(default=None)


class TextSession:
    """A loaded checkpoint that answers one request after another.

    Raises:
        CheckpointError: the folder cannot be loaded, or has no tokenizer.
        ArtifactMismatchError: the tokenizer is not the model's.
        InvalidConfigError: a setting is wrong, or is not a run-time setting.
    """

    def __init__(self, request: TextRequest) -> None:
        folder = request.checkpoint
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: holds no tokenizer (tokenizer.json)")
        self.tokenizer = CognexisTokenizer.from_pretrained(
            folder, allow_tokenizer_mismatch=request.allow_tokenizer_mismatch
        )
        self.model: Any = CognexisForCausalLM.from_pretrained(folder, verify=request.verify)
        check_tokenizer_match(
            self.model.config,
            self.tokenizer,
            generation_config=self.model.generation_config,
            allow_tokenizer_mismatch=request.allow_tokenizer_mismatch,
        )
        self.model.to(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.settings = self._settings(request)

    def _settings(self, request: TextRequest) -> Any:
        """The resolved configuration of the request; only run-time settings may differ from the checkpoint's."""
        overrides = list(request.overrides)
        if request.num_loops is not None:
            overrides.append(f"inference.num_loops={request.num_loops}")
        if request.max_new_tokens is not None:
            overrides.append(f"inference.max_new_tokens={request.max_new_tokens}")
        if request.config_file is not None:
            return load_run_config(request.config_file, "generate", overrides, context="checkpoint")
        stored = request.checkpoint / RESOLVED_FILE
        if stored.is_file():
            return load_run_config(stored, "generate", overrides, context="checkpoint")
        config = run_config_of_checkpoint(self.model.config, self.model.generation_config)
        return apply_overrides(config, overrides, context="checkpoint")

    def generate(self, request: TextRequest) -> Generator[str, None, None]:
        """Yield the text of the answer as it grows; the pieces together are the whole answer.

        A reader who stops early closes the iterator, which ends the generation at the next token.
        """
        ids = self._prompt_ids(request).to(self.model.device)
        pieces: Queue[str | BaseException | None] = Queue()
        streamer = _PieceStreamer(self.tokenizer.stream_decoder(skip_special_tokens=True), pieces)
        keywords = self._keywords()

        is_abandoned = Event()

        def reader_is_gone(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), is_abandoned.is_set(), device=input_ids.device)

        def run() -> None:
            try:
                if request.seed is not None:
                    torch.manual_seed(request.seed)
                mask = torch.ones_like(ids)
                stops = StoppingCriteriaList([reader_is_gone])
                self.model.generate(ids, attention_mask=mask, streamer=streamer, stopping_criteria=stops, **keywords)
            except BaseException as error:
                pieces.put(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            is_abandoned.set()
            thread.join()

    def _prompt_ids(self, request: TextRequest) -> torch.Tensor:
        if not request.prompt:
            raise InvalidConfigError("prompt: must not be empty", path="prompt", value="")
        if request.chat:
            ids = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": request.prompt}], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self.tokenizer.encode_untrusted(request.prompt)
        return torch.tensor([ids])

    def _keywords(self) -> dict[str, Any]:
        inference = self.settings.inference
        sampling = inference.sampling
        keywords: dict[str, Any] = loop_keywords_of(self.settings)
        keywords |= {"max_new_tokens": inference.max_new_tokens, "repetition_penalty": sampling.repetition_penalty}
        if sampling.temperature == 0:
            keywords["do_sample"] = False
        else:
            keywords |= {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        if sampling.stop_strings:
            keywords |= {"stop_strings": list(sampling.stop_strings), "tokenizer": self.tokenizer}
        return keywords


class _PieceStreamer(BaseStreamer):
    """Puts complete characters into a queue, and None at the end; the prompt is left out."""

    def __init__(self, decoder: Any, pieces: "Queue[str | BaseException | None]") -> None:
        self._decoder = decoder
        self._pieces = pieces
        self._prompt_is_over = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_over:
            for token_id in value.flatten().tolist():
                self._pieces.put(self._decoder.push(token_id))
        self._prompt_is_over = True

    def end(self) -> None:
        self._pieces.put(self._decoder.finish())
        self._pieces.put(None)
