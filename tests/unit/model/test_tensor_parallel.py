"""How tensors are cut over ranks, without any ranks."""

from __future__ import annotations

import pytest
import torch

from cogtune.checkpoint.random import published_video_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.distributed.group import TensorGroup
from cogtune.distributed.shards import whole_numel
from cogtune.errors import ConfigError
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import Cut, SplitModel, check_sizes


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_fused_projection_gives_each_rank_its_heads(size: int) -> None:
    """32 query, 8 key and 8 value heads of 128 rows: each rank has 32/size, 8/size and 8/size of them, in order."""
    rows = torch.arange(6144)[:, None].expand(-1, 2)
    cut = Cut(0, (4096, 1024, 1024))
    parts = [cut.take(rows, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        q, k, v = part[:, 0].split([4096 // size, 1024 // size, 1024 // size])
        assert q.tolist() == list(range(rank * 4096 // size, (rank + 1) * 4096 // size))
        assert k.tolist() == list(range(4096 + rank * 1024 // size, 4096 + (rank + 1) * 1024 // size))
        assert v.tolist() == list(range(5120 + rank * 1024 // size, 5120 + (rank + 1) * 1024 // size))
    assert torch.equal(cut.join(parts), rows)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("cut", [Cut(0, (37,)), Cut(1, (37,)), Cut(0, (10, 27)), Cut(0, (3, 34))])
def test_parts_that_are_not_equal_join_again(cut: Cut, size: int) -> None:
    """A vocabulary need not divide; a rank may even get nothing."""
    whole = torch.randn(37, 37)
    parts = [cut.take(whole, rank, size) for rank in range(size)]
    assert [part.shape[cut.dim or 0] for part in parts] == [cut.length(rank, size) for rank in range(size)]
    assert torch.equal(cut.join(parts), whole)


def test_a_bias_behind_a_sum_is_added_once() -> None:
    whole = torch.randn(5)
    parts = [Cut(None).take(whole, rank, 4) for rank in range(4)]
    assert torch.equal(sum(parts), whole)


@pytest.mark.parametrize(
    ("config", "total"),
    [(CogVLM2Config(eos_token_id=[128001, 128009]), 19_503_105_280), (published_video_config(), 12_507_530_496)],
    ids=["pictures", "video"],
)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_published_shapes_on_the_meta_device(size: int, config: CogVLM2Config, total: int) -> None:
    """A rank has its share of all but norms, patch embedding and convolution; cutting twice changes nothing."""
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    whole = sum(value.numel() for value in model.parameters())
    split = SplitModel(TensorGroup(size - 1, size), torch.device("cpu"))
    split.prepare(model)
    own = sum(value.numel() for value in model.parameters())
    assert whole == total
    assert whole / size < own < whole / size + 50e6
    assert sum(whole_numel(value) for value in model.parameters()) == whole
    for name, module in [(f"model.layers.{n}", layer) for n, layer in enumerate(model.model.layers)]:
        split.finish(name, module)
    split.finish("lm_head", model.lm_head)
    assert sum(value.numel() for value in model.parameters()) == own
    attention = model.model.layers[0].self_attn
    assert (attention.num_heads, attention.num_kv_heads) == (32 // size, 8 // size)


def test_other_numbers_of_ranks_are_refused() -> None:
    config = CogVLM2Config(eos_token_id=[128001, 128009])
    for size in (2, 4, 8):
        check_sizes(config, size)
    for size in (3, 5, 16):
        with pytest.raises(ConfigError, match=f"parallel.tensor is {size}") as raised:
            check_sizes(config, size)
        assert "1 or 2 or 4 or 8" in str(raised.value)
