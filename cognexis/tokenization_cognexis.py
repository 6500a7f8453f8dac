"""The tokenizer: a fast tokenizer of transformers with a guard around control tokens.

Text is cut losslessly into pieces, and ids 0 to 9 are control tokens (see ``cognexis/tokens/layout.py``). The stock
call behaves like any fast tokenizer's: it recognises control strings in the text and puts ``<s>`` in front, though
never a second one. Text from outside goes through :meth:`CognexisTokenizer.encode_untrusted` or, as message content,
through :meth:`CognexisTokenizer.apply_chat_template`; there a control string stays text or is refused.

Calls change nothing that other threads see. The saved files also load as a plain ``PreTrainedTokenizerFast``.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging, to_py_obj

from cognexis.checkpoints.commit import finish_interrupted_save, staged_folder
from cognexis.checkpoints.json_file import write_json
from cognexis.checkpoints.metadata import record_tokenizer
from cognexis.errors import ArtifactMismatchError, InvalidConfigError, TokenizerError
from cognexis.tokens.backend_view import Backends, BackendView, EncodeRequest, build_backends
from cognexis.tokens.chat_template import RenderedChat, chat_template_id, plain_data, render_chats
from cognexis.tokens.guard import check_on_control, check_text, strings_in
from cognexis.tokens.layout import BYTE_TOKENS, CONTROL_TOKENS, control_name
from cognexis.tokens.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    NORMALIZATION,
    backend_checksum,
    check_manifest,
    manifest_differences,
    read_manifest,
)
from cognexis.tokens.streaming import TokenStreamDecoder, bytes_of_tokens, make_rules
from cognexis.tokens.truncation import check_policy

logger = logging.get_logger(__name__)

AUTO_TOKENIZER = "tokenization_cognexis.CognexisTokenizer"
# What transformers would write into tokenizer_config.json although it says nothing about the tokenizer.
_NOT_SAVED = (
    "is_local",
    "local_files_only",
    "vocab",
    "merges",
    "tokenizer_object",
    "name_or_path",
    "trust_remote_code",
)
_SAVE_KEYWORDS = ("legacy_format", "filename_prefix", "save_jinja_files")
_REQUEST_KEYS = ("add_bos", "add_eos", "allow_special", "truncation_policy", "segments", "ids_only")


class CognexisTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with fixed control ids, guarded text, four truncation policies and a verified manifest.

    ``__call__`` and ``encode`` take these keywords besides those of transformers:

    * ``add_bos``, ``add_eos``: put the token at that end, unless the text already has it there. The defaults are those
      of the manifest (``<s>``, no ``</s>``) for a standalone text, and neither with ``add_special_tokens=False``.
    * ``allow_special``: False refuses a text that holds a control string.
    * ``truncation_policy``: ``error``, ``left``, ``right`` or ``middle``, with ``max_length``, applied after these
      tokens are added. ``truncation`` keeps its meaning; both at once are an error.

    Args:
        truncation_marker: text that ``middle`` puts where it cuts; its tokens count in ``max_length``.
        training_record: ``type``, ``tokenizer_version`` and ``source`` for the manifest.
        kwargs: as for ``PreTrainedTokenizerFast``.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "manifest_file": MANIFEST_FILE,
        "config_file": "config.json",
    }
    model_input_names = ["input_ids", "attention_mask"]
    _code_writer: ClassVar[Any] = None  # set by the package: writes the code files beside a saved tokenizer
    _backends: Backends | None = None
    _tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        record = kwargs.pop("training_record", None) or {}
        self._training_record: dict[str, Any] = dict(record)
        for name in ("trust_remote_code", "manifest_file", "config_file"):
            kwargs.pop(name, None)
        super().__init__(*args, **kwargs)
        self._tokenizer.encode_special_tokens = False  # split_special_tokens chooses the other backend instead
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def backends(self) -> Backends:
        """The two backends, one of which takes every text for text. Built once, again after tokens were added."""
        backends = self._backends
        if backends is None:
            ends = self._tokenizer.encode("").ids
            backends = build_backends(
                self._tokenizer,
                adds_bos=self.bos_token_id is not None and ends[:1] == [self.bos_token_id],
                adds_eos=self.eos_token_id is not None and ends[-1:] == [self.eos_token_id],
                token_bytes=bytes_of_tokens(self._tokenizer),
            )
            self._backends = backends  # two threads may both get here; their results are equal
        return backends

    @property
    def checksum(self) -> str:
        """``sha256:...`` of vocabulary and model; see ``cognexis/tokens/manifest.py`` for what it covers."""
        return backend_checksum(self._tokenizer.to_str())

    @property
    def truncation_marker(self) -> str | None:
        """Text that ``truncation_policy="middle"`` puts where it cuts."""
        return self.__dict__.get("init_kwargs", {}).get("truncation_marker")

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``tokenizer_manifest.json`` says about this tokenizer.

        Raises:
            TokenizerError: a control token is missing, or two share a name or an id.
        """
        names = {getattr(self, f"{name}_token"): name for name in ("bos", "eos", "pad", "unk")}
        names.pop(None, None)
        special = {str(token): token_id for token, token_id in self._special_ids().items()}
        record = self._training_record
        manifest = {
            "schema_version": MANIFEST_VERSION,
            "type": record.get("type") or self._guess_type(),
            "tokenizer_version": record.get("tokenizer_version") or "1",
            "vocab_size": len(self),
            "allow_byte_fallback": bool(json.loads(self._tokenizer.to_str())["model"].get("byte_fallback")),
            "add_bos_default": self.backends.adds_bos,
            "add_eos_default": self.backends.adds_eos,
            "normalization": dict(NORMALIZATION),
            "special_tokens": [
                {"name": names.get(token) or control_name(token), "token": token, "id": token_id}
                for token, token_id in sorted(special.items(), key=lambda item: item[1])
            ],
            "chat_template": chat_template_id(self.chat_template),
            "checksum": self.checksum,
        }
        if record.get("source"):
            manifest["source"] = record["source"]
        return check_manifest(manifest)

    def _special_ids(self) -> dict[str, int]:
        special = {token.content: index for index, token in self.added_tokens_decoder.items() if token.special}
        return special | dict(zip(map(str, self.all_special_tokens), self.all_special_ids, strict=True))

    def _guess_type(self) -> str:
        kind = type(self._tokenizer.model).__name__
        if kind == "Unigram":
            return "sentencepiece"
        ordinary = self._tokenizer.get_vocab().keys() - self._special_ids().keys()
        return "byte_reference" if ordinary == set(BYTE_TOKENS) else "bpe"

    # -- encoding --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, tokenizer_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> BatchEncoding:
        """Encode a text, a pair, or a batch of either; see the class for what is added to transformers' keywords."""
        return super().__call__(*args, **{**kwargs, **(tokenizer_kwargs or {})})

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """The ids of a text or a pair; see the class for what is added to transformers' keywords."""
        return super().encode(text, text_pair, ids_only=True, **kwargs)

    def encode_untrusted(
        self,
        text: str,
        on_control: str = "text",
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        max_characters: int | None = None,
        truncation_policy: str | None = None,
        max_length: int | None = None,
    ) -> list[int]:
        """Encode text from outside: no control id comes of it but those that this call adds at the ends.

        Args:
            text: any text; NUL, control strings and look-alikes are ordinary characters in it.
            on_control: ``text`` encodes control strings as letters, ``raise`` refuses them.
            add_bos: put ``<s>`` in front; None means as in ``encode``.
            add_eos: put ``</s>`` behind; None means as in ``encode``.
            max_characters: longest text that is encoded at all.
            truncation_policy: what happens to a text of more than ``max_length`` tokens.
            max_length: number of tokens, the added ones included.

        Raises:
            TokenizerError: no string, too long, a lone surrogate, or a control string under ``raise``.
        """
        check_on_control(on_control)
        check_text(text, max_characters)
        if on_control == "raise":
            self.backends.guard.refuse(text, "on_control='text' takes it for text")
        settings: dict[str, Any] = {"add_bos": add_bos, "add_eos": add_eos, "split_special_tokens": True}
        if truncation_policy is not None:
            settings |= {"truncation_policy": truncation_policy, "max_length": max_length}
        return self.encode(text, **settings)

    def _get_padding_truncation_strategies(  # type: ignore[override]
        self, padding: Any = False, truncation: Any = None, **kwargs: Any
    ) -> Any:
        policy = kwargs.get("truncation_policy")
        if policy is not None:
            if truncation not in (None, False, "do_not_truncate"):
                raise InvalidConfigError(
                    f"truncation={truncation!r} and truncation_policy={policy!r}: give one of them",
                    path="truncation_policy",
                    value=policy,
                )
            check_policy(policy, kwargs.get("max_length"))
            if kwargs.get("return_overflowing_tokens") or kwargs.get("stride"):
                raise InvalidConfigError("overflowing tokens belong to truncation, not to truncation_policy")
            truncation, kwargs = False, {**kwargs, "verbose": False}
        return super()._get_padding_truncation_strategies(padding=padding, truncation=truncation, **kwargs)

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        settings = {name: kwargs.pop(name) for name in _REQUEST_KEYS if kwargs.get(name) is not None}
        kwargs.pop("sanitize_control_tokens", None)  # chat content is always encoded as text
        if settings.get("truncation_policy") and text_pair is not None:
            raise InvalidConfigError(
                "truncation_policy is for single texts; use truncation='longest_first' for pairs",
                path="truncation_policy",
                value=settings["truncation_policy"],
            )
        view = BackendView(
            self.backends,
            EncodeRequest(**settings),
            bos=None if self.bos_token_id is None else (self.bos_token, self.bos_token_id),
            eos=None if self.eos_token_id is None else (self.eos_token, self.eos_token_id),
            max_length=kwargs.get("max_length"),
            marker=self.truncation_marker,
        )
        call = object.__new__(type(self))
        call.__dict__.update(self.__dict__, _tokenizer=view)
        return super(CognexisTokenizer, call)._encode_plus(text, text_pair=text_pair, **kwargs)

    # -- decoding --------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Text of one sequence, or of each sequence of a batch; white space stays as it is.

        Args:
            token_ids: integers, or a tensor or array of them.
            skip_special_tokens: leave control tokens out.
            kwargs: ``stop_at_eos=False`` ends before the first end-of-text token, ``skip_padding=True`` leaves padding
                out, ``show_special=None`` overrides ``skip_special_tokens``.

        Raises:
            InvalidTokenIdError: an id that is no integer or not in the vocabulary.
        """
        return super().decode(to_py_obj(token_ids), skip_special_tokens=skip_special_tokens, **kwargs)

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        stop_at_eos: bool = False,
        skip_padding: bool = True,
        show_special: bool | None = None,
        **kwargs: Any,
    ) -> str:
        rules = make_rules(self, skip_special_tokens, stop_at_eos, skip_padding, show_special)
        ids = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = ids if isinstance(ids, list | tuple) else [ids]
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= rules.size:
            ids = [rules.check(token_id) for token_id in ids]
        ids = rules.kept(ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        table = self.backends.token_bytes if "\ufffd" in text else None
        return text if table is None else b"".join(map(table.__getitem__, ids)).decode("utf-8", "replace")

    def stream_decoder(self, skip_special_tokens: bool = False, **rules: Any) -> TokenStreamDecoder:
        """A decoder for one request; see :class:`TokenStreamDecoder`."""
        return TokenStreamDecoder(self, skip_special_tokens, **rules)

    # -- chats -----------------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        on_control: str = "text",
        allow_special: bool = False,
        truncation_policy: str | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Render one chat or a batch and encode it; only the template itself can give control ids.

        Everything else (roles, content, names, tool calls, ``tools``, ``documents``, ``kwargs``) is encoded as text.
        What transformers says about its arguments holds here too.

        Args:
            on_control: ``text``, or ``raise`` to refuse a chat that holds a control string anywhere.
            allow_special: with ``tokenize=False``, give the text although a tokenizer would find control strings in it
                that are not the template's.
            truncation_policy: as in ``__call__``.
            sanitize_control_tokens: accepted for callers of newer transformers; it is always done.

        Raises:
            InvalidConfigError: no messages, an unknown role, or a template that cannot be used.
            TokenizerError: a control string under ``raise``, or in a chat that is to be rendered as text only.
        """
        check_on_control(on_control)
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise InvalidConfigError("return_assistant_tokens_mask=True needs return_dict=True and tokenize=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise InvalidConfigError(
                "continue_final_message excludes add_generation_prompt and return_assistant_tokens_mask"
            )
        first = conversation[0] if isinstance(conversation, list | tuple) and conversation else None
        is_batched = isinstance(first, list | tuple) or hasattr(first, "messages")
        chats = render_chats(
            conversation if is_batched else [conversation],
            self.get_chat_template(chat_template, tools),
            self.backends.guard,
            self.special_tokens_map,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=kwargs,
        )
        if on_control == "raise":
            for text in strings_in(plain_data([getattr(conversation, "messages", conversation), documents, kwargs])):
                self.backends.guard.refuse(text, "on_control='text' takes it for text")
        forged = next((chat.forged for chat in chats if chat.forged), None)
        if forged and (on_control == "raise" or not (tokenize or allow_special)):
            raise TokenizerError(
                f"the chat holds the control token {forged}, which is not the template's own; as text alone it would "
                "be taken for one (tokenize=True with on_control='text' encodes it safely)"
            )
        texts = [chat.text for chat in chats]
        if not tokenize:
            return texts if is_batched else texts[0]
        settings = {"truncation_policy": truncation_policy} if truncation_policy else {"truncation": truncation}
        encoded = self(
            texts,
            add_special_tokens=False,
            padding=padding,
            max_length=max_length,
            segments=[chat.segments() for chat in chats],
            **{**settings, **(tokenizer_kwargs or {})},
        )
        if return_assistant_tokens_mask:
            encoded["assistant_masks"] = [
                _assistant_mask(encoding, chat) for encoding, chat in zip(encoded.encodings or [], chats, strict=True)
            ]
        if not is_batched and return_tensors is None:
            encoded = BatchEncoding({name: values[0] for name, values in encoded.items()}, encoded.encodings)
        encoded.convert_to_tensors(tensor_type=return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    # -- state, loading and saving -----------------------------------------------------------------------------------

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        self._backends = None
        return added

    def update_post_processor(self) -> None:
        super().update_post_processor()
        self._backends = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backends": None}  # a pickled backend would recognise control strings again

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keep the file's name; transformers would take the vocabulary out of it and build half a backend."""
        return kwargs

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: Any, *args: Any, **kwargs: Any
    ) -> "CognexisTokenizer":
        """Load a tokenizer and compare it with its manifest, and with the ``config.json`` beside it.

        ``source`` is a folder, a repository on the Hub, or a ``tokenizer.json``; of a lone one the control tokens are
        taken by their usual strings.
        ``allow_tokenizer_mismatch=True`` turns a difference into a logged warning; for research.

        Raises:
            TokenizerError: a file cannot be read, or the manifest is malformed.
            ArtifactMismatchError: tokenizer and manifest, or tokenizer and ``tokenizer_checksum`` of the model differ.
        """
        path = Path(source)
        if path.is_dir():
            finish_interrupted_save(path)
        if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
            source = path.parent
        try:
            return super().from_pretrained(source, *args, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TokenizerError(f"the tokenizer's files cannot be read: {error}") from error

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: dict[str, Any], *args: Any, allow_tokenizer_mismatch: bool = False, **kwargs: Any
    ) -> "CognexisTokenizer":
        files = dict(resolved_vocab_files)
        companions = {name: files.pop(name, None) for name in ("manifest_file", "config_file")}
        model_file = files.get("tokenizer_file")
        if model_file is None:
            raise TokenizerError(f"no tokenizer.json in {args[0] if args else 'the folder'}")
        folder = Path(model_file).parent
        manifest_file = Path(companions["manifest_file"] or folder / MANIFEST_FILE)
        config_file = Path(companions["config_file"] or folder / "config.json")
        manifest = read_manifest(manifest_file) if manifest_file.is_file() else None
        content = Path(model_file).read_bytes()
        checksum = backend_checksum(content)
        if files.get("tokenizer_config_file") is None:
            kwargs = _usual_tokens(content) | kwargs
        differences = []
        if manifest and manifest["checksum"] != checksum:
            differences.append(f"{MANIFEST_FILE} says checksum {manifest['checksum']}, tokenizer.json has {checksum}")
        if (expected := _checksum_of_model(config_file)) and expected != checksum:
            differences.append(f"config.json says tokenizer_checksum {expected}, tokenizer.json has {checksum}")
        _report(differences, allow_tokenizer_mismatch)
        try:
            tokenizer = super()._from_pretrained(files, *args, **kwargs, training_record=manifest)
        except Exception as error:
            if type(error) is not Exception:  # what tokenizers raises for a file that it cannot use
                raise
            raise TokenizerError(f"tokenizer.json cannot be used: {error}") from error
        if manifest and not differences:
            actual = {**tokenizer.manifest}
            if "chat_template" in kwargs:
                actual["chat_template"] = manifest["chat_template"]
            _report(manifest_differences(manifest, actual), allow_tokenizer_mismatch)
        return tokenizer

    def save_pretrained(
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write the tokenizer, its manifest and, from the package, the code that others need to load it.

        All files appear at once; where the folder is a checkpoint, its records are brought up to date with them.

        Raises:
            CheckpointError: the place cannot be written; nothing is changed then.
        """
        self.manifest  # noqa: B018 - refuses before anything is written
        folder = Path(save_directory)
        hub_keywords = {key: kwargs.pop(key) for key in list(kwargs) if key not in _SAVE_KEYWORDS}
        if hub_keywords and not push_to_hub:
            raise TypeError(f"save_pretrained() got unexpected keywords {sorted(hub_keywords)}")
        with staged_folder(folder) as staging:
            written = super().save_pretrained(staging, *args, **kwargs)
            record_tokenizer(staging, folder)
        if push_to_hub:
            self.push_to_hub(hub_keywords.pop("repo_id", folder.name), **hub_keywords)
        return tuple(str(folder / Path(path).name) for path in written)

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        folder = Path(save_directory)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        config_file = folder / f"{prefix}tokenizer_config.json"
        config = json.loads(config_file.read_text("utf-8"))
        config = {key: value for key, value in config.items() if key not in _NOT_SAVED}
        config["auto_map"] = {"AutoTokenizer": [None, AUTO_TOKENIZER]}
        write_json(config_file, dict(sorted(config.items())))
        file_names = super()._save_pretrained(folder, file_names, legacy_format, filename_prefix)
        write_json(folder / f"{prefix}{MANIFEST_FILE}", self.manifest)
        code = type(self)._code_writer(folder, self) if self._code_writer is not None else []
        return (*file_names, str(folder / f"{prefix}{MANIFEST_FILE}"), *(str(folder / name) for name in code))


def _assistant_mask(encoding: Any, chat: RenderedChat) -> list[int]:
    """1 for each token of what the assistant says, by its place in the text, so after truncation and padding too."""
    mask, spans, current = [], chat.generated, 0
    for (start, end), is_token in zip(encoding.offsets, encoding.attention_mask, strict=True):
        while current < len(spans) and start >= spans[current][1]:
            current += 1
        inside = current < len(spans) and spans[current][0] <= start and start < end
        mask.append(int(bool(inside and is_token)))
    return mask


def _usual_tokens(content: bytes) -> dict[str, Any]:
    """The arguments that ``tokenizer_config.json`` would give, from the control strings of a lone tokenizer.json."""
    present = {token["content"] for token in json.loads(content).get("added_tokens", []) if token["special"]}
    names = zip(("bos_token", "eos_token", "pad_token", "unk_token"), CONTROL_TOKENS, strict=False)
    found: dict[str, Any] = {name: token for name, token in names if token in present}
    return found | {"extra_special_tokens": [token for token in CONTROL_TOKENS[4:] if token in present]}


def _checksum_of_model(config_file: Path) -> str | None:
    if not config_file.is_file():
        return None
    try:
        config = json.loads(config_file.read_bytes())
    except ValueError:
        return None  # the model's own loader says what is wrong with it
    return config.get("tokenizer_checksum") if isinstance(config, dict) else None


def _report(differences: list[str], is_allowed: bool) -> None:
    if not differences:
        return
    message = f"the tokenizer is not the one that was saved: {'; '.join(differences)}"
    if not is_allowed:
        raise ArtifactMismatchError(message, path="tokenizer_checksum")
    logger.warning(message)


__all__ = ["CognexisTokenizer"]
