"""The memory stacks that the evaluation compares.

A recipe builds an untrained stack of a given width; ``missing`` says in words why this machine cannot run it. Stacks
are built under the caller's random state.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cognexis.cortex_layers.config import (
    AxonConfig,
    BlockConfig,
    CortexStackConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PreUpBlockConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.errors import InvalidConfigError

SMOLLM = "HuggingFaceTB/SmolLM-360M"


@dataclass(frozen=True)
class StackRecipe:
    """How one registered stack is made.

    Args:
        title: what it consists of.
        build: makes the stack for a width.
        width: the width D that is used unless another is asked for.
        is_width_fixed: whether only ``width`` is possible.
        missing: why it cannot run here, or None.
    """

    title: str
    build: Callable[[int], nn.Module]
    width: int = 128
    is_width_fixed: bool = False
    missing: Callable[[], str | None] = lambda: None


def _from_blocks(*blocks: BlockConfig) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        from cognexis.cortex_layers.factory import build_cortex

        return build_cortex(CortexStackConfig(d_hidden=width, blocks=list(blocks)))

    return build


def _from_pattern(pattern: str, *, compile_blocks: bool = False) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        from cognexis.cortex_layers.stacks import build_cortex_auto_stack

        return build_cortex_auto_stack(d_hidden=width, num_layers=2, pattern=pattern, compile_blocks=compile_blocks)

    return build


def _build_smollm(width: int) -> nn.Module:
    import torch

    from cognexis.cortex_layers.factory import build_cortex
    from cognexis.cortex_layers.stacks import build_hf_stack_config

    return build_cortex(build_hf_stack_config(SMOLLM, dtype=torch.bfloat16, mem_len=64))


def _smollm_missing() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model.safetensors")
    if all(isinstance(try_to_load_from_cache(SMOLLM, file), str) for file in files):
        return None
    return f"the weights of {SMOLLM} are not in the Hugging Face cache; fetch them with `hf download {SMOLLM}`"


def _slstm(*, axon: bool = False) -> BlockConfig:
    return PostUpBlockConfig(proj_factor=1.5, cell=sLSTMCellConfig(num_heads=4, use_axon_layer=axon))


def _mlstm(*, axon: bool = False) -> BlockConfig:
    cell = mLSTMCellConfig(num_heads=4, chunk_size=256, use_axon_layer=axon, use_axon_qkv=axon)
    return PreUpBlockConfig(proj_factor=2.0, cell=cell)


STACKS: dict[str, StackRecipe] = {
    "slstm": StackRecipe("PostUp(sLSTM)", _from_blocks(_slstm())),
    "mlstm": StackRecipe("PreUp(mLSTM)", _from_blocks(_mlstm())),
    "slstm_axon": StackRecipe(
        "PreUp(Axon), PostUp(sLSTM^)",
        _from_blocks(PreUpBlockConfig(cell=AxonConfig(activation="silu")), _slstm(axon=True)),
    ),
    "mlstm_axon": StackRecipe(
        "PassThrough(Axon), PreUp(mLSTM^)",
        _from_blocks(PassThroughBlockConfig(cell=AxonConfig()), _mlstm(axon=True)),
    ),
    "axons": StackRecipe(
        "PassThrough(Axon), PreUp(Axon)",
        _from_blocks(PassThroughBlockConfig(cell=AxonConfig()), PreUpBlockConfig(cell=AxonConfig())),
    ),
    "cortex_auto": StackRecipe("2 columns AMS", _from_pattern("AMS")),
    "cortex_auto_compiled": StackRecipe("2 columns AXMS, compiled", _from_pattern("AXMS", compile_blocks=True)),
    "cortex_auto_axon": StackRecipe("2 columns M^X^S^", _from_pattern("M^X^S^")),
    "smollm": StackRecipe(
        "the decoder layers of SmolLM-360M", _build_smollm, width=960, is_width_fixed=True, missing=_smollm_missing
    ),
}
ALIASES = {"slstm_postup": "slstm", "mlstm_preup": "mlstm"}


def stack_names(name: str) -> list[str]:
    """The registered stacks that ``name`` means: all of them for "all", else one.

    Raises:
        InvalidConfigError: no stack has the name; lists the known ones.
    """
    if name == "all":
        return list(STACKS)
    key = ALIASES.get(name, name)
    if key not in STACKS:
        known = ", ".join([*STACKS, *ALIASES, "all"])
        raise InvalidConfigError(f"stack={name!r}: must be one of {known}", path="stack", value=name)
    return [key]
