"""Configurations of cells, blocks, columns and stacks, as pydantic models.

A configuration that stands where any cell or block may stand is told apart by its tag (``cell_type``, ``block_type``),
also in JSON: ``{"cell_type": "lstm", "num_layers": 2}``. ``hidden_size=None``: the block decides. Sizes and counts are
integers and nothing that could be read as one (``"4"``, ``True``); other numbers are finite.
Unknown fields, unknown tags and impossible values are ``ValidationError``s (a ``ValueError``) that name the field.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, Strict, model_validator

LARGEST_WIDTH = 2**20
Count = Annotated[int, Strict()]
Width = Annotated[int, Strict(), Field(ge=1, le=LARGEST_WIDTH)]

ACTIVATIONS = ("identity", "linear", "relu", "silu", "swish", "tanh")

_CELLS: dict[str, type["CellConfig"]] = {}
_BLOCKS: dict[str, type["BlockConfig"]] = {}


class StrictConfig(BaseModel):
    """Base of all configurations here: unknown fields are errors, numbers are finite."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)


class CellConfig(StrictConfig):
    """Base of all cell configurations; subclass it for a cell of your own and give ``cell_type`` a default."""

    cell_type: str = ""
    hidden_size: Width | None = None


class BlockConfig(StrictConfig):
    """Base of all block configurations; subclass it for a block of your own and give ``block_type`` a default."""

    block_type: str = ""
    cell: Annotated[SerializeAsAny[CellConfig] | None, BeforeValidator(lambda value: _cell(value))] = None

    def get_cell_hidden_size(self, d_hidden: int) -> int:
        """The width at which the block runs its cell."""
        return d_hidden


def _by_tag(value: Any, key: str, table: dict[str, Any], kind: str) -> Any:
    if not isinstance(value, dict):
        return value
    tag = value.get(key)
    if not tag:
        raise ValueError(f"{kind}: {key} is missing; must be one of {', '.join(sorted(table))}")
    if tag not in table:
        raise ValueError(f"{kind}: {key}={tag!r}: must be one of {', '.join(sorted(table))}")
    return table[tag].model_validate(value)


def _cell(value: Any) -> Any:
    return _by_tag(value, "cell_type", _CELLS, "cell")


def _block(value: Any) -> Any:
    return _by_tag(value, "block_type", _BLOCKS, "block")


def config_by_tag(value: Any) -> Any:
    """The configuration of a cell or a block from its dictionary, whichever tag it has."""
    return _block(value) if isinstance(value, dict) and "block_type" in value else _cell(value)


AnyCell = Annotated[SerializeAsAny[CellConfig], BeforeValidator(_cell)]
AnyBlock = Annotated[SerializeAsAny[BlockConfig], BeforeValidator(_block)]


def register_config(config_class: type[CellConfig] | type[BlockConfig]) -> str:
    """Make a configuration class known by its tag, which may be left out: then it is derived from the class name.

    Raises:
        ValueError: another class has the tag.
    """
    is_cell = issubclass(config_class, CellConfig)
    key, table = ("cell_type", _CELLS) if is_cell else ("block_type", _BLOCKS)
    tag = config_class.model_fields[key].default
    bases: list[Any] = [base for base in config_class.__mro__[1:] if key in getattr(base, "model_fields", {})]
    inherited = {base.model_fields[key].default for base in bases}
    if not tag or tag in inherited:
        tag = config_class.__name__.removesuffix("Config").removesuffix("Cell").removesuffix("Block").lower()
        config_class.model_fields[key].default = tag
        config_class.model_rebuild(force=True)
    known = table.get(tag)
    same = known is not None and (known.__module__, known.__qualname__) == (
        config_class.__module__,
        config_class.__qualname__,
    )
    if known is not None and known is not config_class and not same:
        raise ValueError(f"{key}={tag!r} of {config_class.__name__} is taken by {known.__name__}")
    table[tag] = config_class  # type: ignore[assignment]
    return tag


def get_registered_cell_config(cell_type: str) -> type[CellConfig]:
    """The class of a cell's tag.

    Raises:
        ValueError: no class has it.
    """
    if cell_type not in _CELLS:
        raise ValueError(f"cell_type={cell_type!r}: must be one of {', '.join(sorted(_CELLS))}")
    return _CELLS[cell_type]


# -- cells ---------------------------------------------------------------------------------------------------------


class AxonConfig(CellConfig):
    """A recurrence per channel with a complex pole, and what mixes the channels in front of it."""

    cell_type: str = "axon"
    activation: str = "identity"
    r_max: float = Field(default=1.0, gt=0, le=1)
    r_min: float = Field(default=0.0, ge=0, lt=1)
    max_phase: float = Field(default=6.28, gt=0)
    out_dim: Width | None = None
    cuda_seq_threshold: Count = Field(default=5000, ge=1)
    use_srht: bool = False
    srht_permute: bool = True
    use_fullrank_rtu: bool = False
    use_untraced_linear: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_mixer(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("use_srht"):
            if "use_untraced_linear" not in data:
                return data | {"use_untraced_linear": False}
            if data["use_untraced_linear"]:
                raise ValueError("use_srht=True and use_untraced_linear=True exclude each other; switch one off")
        return data

    @model_validator(mode="after")
    def _check(self) -> "AxonConfig":
        if self.activation.lower() not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if self.r_min >= self.r_max:
            raise ValueError(f"r_min={self.r_min}: must be below r_max={self.r_max}")
        return self


class LSTMCellConfig(CellConfig):
    """``torch.nn.LSTM`` with a TensorDict state."""

    cell_type: str = "lstm"
    num_layers: Count = Field(default=1, ge=1)
    bias: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)
    proj_size: Count = Field(default=0, ge=0)


class GRUCellConfig(CellConfig):
    """``torch.nn.GRU`` with a TensorDict state."""

    cell_type: str = "gru"
    num_layers: Count = Field(default=1, ge=1)
    bias: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)


class CausalConv1dConfig(CellConfig):
    """A causal convolution over time; ``kernel_size=0`` is the identity."""

    cell_type: str = "cconv"
    kernel_size: Count = Field(default=4, ge=0)
    causal_conv_bias: bool = True
    channel_mixing: bool = False

    @property
    def feature_dim(self) -> int | None:
        """Another name of ``hidden_size``."""
        return self.hidden_size


class _Heads(CellConfig):
    num_heads: Count = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "_Heads":
        if self.hidden_size is not None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide hidden_size={self.hidden_size}")
        return self


class mLSTMCellConfig(_Heads):
    """Matrix LSTM: an outer-product memory per head, exponential gates, chunkwise training."""

    cell_type: str = "mlstm"
    chunk_size: Count = Field(default=64, ge=1)
    conv1d_kernel_size: Count = Field(default=4, ge=0)
    use_axon_layer: bool = False
    use_axon_qkv: bool = False
    axon_layer_config: AxonConfig | None = None
    axon_qkv_config: AxonConfig | None = None


class sLSTMCellConfig(_Heads):
    """Scalar LSTM: exponential gates and a recurrent matrix per head."""

    cell_type: str = "slstm"
    conv1d_kernel_size: Count = Field(default=4, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    use_axon_layer: bool = False
    axon_layer_config: AxonConfig | None = None


class XLCellConfig(CellConfig):
    """Attention with relative positions over a rolling memory of past inputs."""

    cell_type: str = "xl"
    n_heads: Count = Field(default=4, ge=1)
    head_dim: Count | None = Field(default=None, ge=1)
    mem_len: Count = Field(default=128, ge=0)
    attn_dropout: float = Field(default=0.0, ge=0, le=1)
    out_dropout: float = Field(default=0.0, ge=0, le=1)
    use_bias: bool = True
    use_axon_qkv: bool = False
    axon_qkv_config: AxonConfig | None = None
    detach_memory: bool = True

    @model_validator(mode="after")
    def _divides(self) -> "XLCellConfig":
        if self.hidden_size is not None and self.head_dim is None and self.hidden_size % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads}: must divide hidden_size={self.hidden_size}, or give head_dim")
        return self


class AGaLiTeCellConfig(CellConfig):
    """Gated linear attention with oscillating low-rank memories."""

    cell_type: str = "agalite"
    n_heads: Count = Field(default=8, ge=1)
    head_dim: Count | None = Field(default=None, ge=1)
    eta: Count = Field(default=6, ge=1)
    r: Count = Field(default=2, ge=1)
    eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, le=1)
    detach_memory: bool = True

    @model_validator(mode="after")
    def _divides(self) -> "AGaLiTeCellConfig":
        if self.hidden_size is not None:
            width = self.n_heads * (self.head_dim or self.hidden_size // self.n_heads)
            if width != self.hidden_size:
                raise ValueError(
                    f"n_heads={self.n_heads}, head_dim={self.head_dim}: their product must be hidden_size="
                    f"{self.hidden_size}"
                )
        return self


class HFLlamaLayerConfig(CellConfig):
    """A decoder layer of a Llama model as a cell; the modules themselves are attributes that no dump holds."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    cell_type: str = "hf_llama_layer"
    mem_len: Count = Field(default=0, ge=0)
    inplace_cache: bool = False
    detach_memory: bool = True
    hf_layer: Any = Field(default=None, exclude=True, repr=False)
    hf_submodel: Any = Field(default=None, exclude=True, repr=False)
    hf_config: Any = Field(default=None, exclude=True, repr=False)


# -- blocks --------------------------------------------------------------------------------------------------------


class PassThroughBlockConfig(BlockConfig):
    """The cell at the stack's width, with a residual unless it is switched off."""

    block_type: str = "passthrough"
    residual: bool = True


class PreUpBlockConfig(BlockConfig):
    """Project up, run the cell at the inner width, gate, project down, add."""

    block_type: str = "preup"
    proj_factor: float = Field(default=2.0, gt=0)
    activate_cell_input: bool = True

    def get_cell_hidden_size(self, d_hidden: int) -> int:
        return inner_size(self.proj_factor, d_hidden)


class PostUpBlockConfig(BlockConfig):
    """The cell at the stack's width, then a feed-forward layer, each with a residual."""

    block_type: str = "postup"
    proj_factor: float = Field(default=1.5, gt=0)
    gated: bool = True


class PostUpGatedBlockConfig(BlockConfig):
    """Like post-up, with gates of a GRU in place of the residuals."""

    block_type: str = "postup_gated"
    proj_factor: float = Field(default=1.5, gt=0)
    gru_bias: float = 2.0


class AdapterBlockConfig(BlockConfig):
    """A bottleneck added to another block; the identity at the start."""

    _activations: ClassVar = ("gelu", "silu", "relu")

    block_type: str = "adapter"
    base_block: AnyBlock
    bottleneck: Count = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, le=1)
    per_channel_gate: bool = False
    activation: str = "gelu"

    def get_cell_hidden_size(self, d_hidden: int) -> int:
        return self.base_block.get_cell_hidden_size(d_hidden)

    @model_validator(mode="after")
    def _check(self) -> "AdapterBlockConfig":
        if self.activation not in self._activations:
            raise ValueError(f"activation={self.activation!r}: must be one of {', '.join(self._activations)}")
        return self


class RouterConfig(StrictConfig):
    """How a column weighs its experts: a global prior, and a refinement per token."""

    d_key: Count | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: Count | None = Field(default=None, ge=1)
    use_sqrt_scale: bool = True
    init_scale_wq: float = Field(default=0.0, ge=0)
    init_scale_wk: float | None = Field(default=None, ge=0)
    d_key_local: Count | None = Field(default=None, ge=1)
    local_temperature: float = Field(default=1.0, gt=0)
    whisper_lambda: float = Field(default=0.1, ge=0)
    center_refine: bool = True
    restrict_to_topk: bool = True

    @model_validator(mode="after")
    def _check(self) -> "RouterConfig":
        if self.init_scale_wq == 0 and self.init_scale_wk == 0:
            raise ValueError("init_scale_wq=0 and init_scale_wk=0: the router could never learn; give one a value")
        return self


class ColumnBlockConfig(BlockConfig):
    """Experts that run side by side, mixed by a router."""

    block_type: str = "column"
    experts: list[AnyBlock] = Field(min_length=1)
    router: RouterConfig = Field(default_factory=lambda: RouterConfig())
    alpha_init: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "ColumnBlockConfig":
        if self.router.top_k is not None and self.router.top_k > len(self.experts):
            raise ValueError(f"router.top_k={self.router.top_k}: there are {len(self.experts)} experts")
        return self


# -- stacks, and cells made of them ----------------------------------------------------------------------------------


class CortexStackConfig(StrictConfig):
    """Blocks in sequence at one width, and a norm behind them."""

    blocks: list[AnyBlock]
    d_hidden: Width
    post_norm: bool = True
    compile_blocks: bool = False


class BlockCellConfig(CellConfig):
    """A block used as a cell."""

    cell_type: str = "block_cell"
    block: AnyBlock


class StackCellConfig(CellConfig):
    """A stack used as a cell; its ``d_hidden`` gives way to the cell's width."""

    cell_type: str = "stack_cell"
    stack: CortexStackConfig


class SequentialCellConfig(CellConfig):
    """Several cells one after another, as one cell."""

    cell_type: str = "sequential_cell"
    cells: list[AnyCell] = Field(min_length=1)


def inner_size(proj_factor: float, d_hidden: int) -> int:
    """The inner width of a block.

    Raises:
        ValueError: it would be zero, or above ``LARGEST_WIDTH``.
    """
    size = int(proj_factor * d_hidden)
    if not 1 <= size <= LARGEST_WIDTH:
        raise ValueError(
            f"proj_factor={proj_factor}: gives an inner width of {size} at d_hidden={d_hidden}, "
            f"which must be from 1 to {LARGEST_WIDTH}"
        )
    return size


for _class in (
    *(AxonConfig, LSTMCellConfig, GRUCellConfig, CausalConv1dConfig, mLSTMCellConfig, sLSTMCellConfig, XLCellConfig),
    *(AGaLiTeCellConfig, HFLlamaLayerConfig, BlockCellConfig, StackCellConfig, SequentialCellConfig),
    *(PassThroughBlockConfig, PreUpBlockConfig, PostUpBlockConfig, PostUpGatedBlockConfig, AdapterBlockConfig),
    ColumnBlockConfig,
):
    register_config(_class)

__all__ = [
    "AGaLiTeCellConfig",
    "AdapterBlockConfig",
    "AxonConfig",
    "BlockCellConfig",
    "BlockConfig",
    "CausalConv1dConfig",
    "CellConfig",
    "ColumnBlockConfig",
    "CortexStackConfig",
    "GRUCellConfig",
    "HFLlamaLayerConfig",
    "LSTMCellConfig",
    "PassThroughBlockConfig",
    "PostUpBlockConfig",
    "PostUpGatedBlockConfig",
    "PreUpBlockConfig",
    "RouterConfig",
    "SequentialCellConfig",
    "StackCellConfig",
    "XLCellConfig",
    "mLSTMCellConfig",
    "register_config",
    "sLSTMCellConfig",
]
