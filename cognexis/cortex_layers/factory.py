"""Building stacks from configurations."""

from cognexis.cortex_layers.stacks.build import build_cortex, build_from_dict

__all__ = ["build_cortex", "build_from_dict"]
