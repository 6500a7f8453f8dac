"""The Axon recurrence, and the layer that puts it beside a linear map."""

from cognexis.cortex_layers.cells.core.axon_cell import AxonCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer, update_parent_state

__all__ = ["AxonCell", "AxonLayer", "update_parent_state"]
