"""Sizes of communication buffers, shared by the engines that allocate them and the planner that counts them. No
torch."""

SUM_BUCKET = 16 * 2**20
"""Values per all-reduce of gradients: 64 MiB in float32."""

ZERO_BUCKET = 500_000_000
"""Values of DeepSpeed's reduction bucket if its file sets none; DeepSpeed's own default."""

ZERO3_LAYERS_AHEAD = 2
"""Layers that zero3 may enqueue ahead of the device. Their weights are all-gathered, so each of them holds memory."""
