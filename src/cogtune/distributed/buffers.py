"""How much ranks exchange in one piece. The engines use these numbers and the planner counts them; without torch."""

SUM_BUCKET = 16 * 2**20
"""Values of one all-reduce of gradients: 64 MiB in float32."""

ZERO_BUCKET = 500_000_000
"""Values of DeepSpeed's reduction bucket where its file says nothing, as DeepSpeed's own default."""

ZERO3_LAYERS_AHEAD = 2
"""Layers that may wait in the device's queue under zero3. Their weights are gathered, so each of them holds memory."""
