"""FSDP2 with the core as one unit: gradients of a single process, also where ranks run different loop counts."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_flatten

from cognexis.training.activation_checkpointing import set_activation_checkpointing
from tests.batteries.interrupted_training import in_child, wait_for
from tests.batteries.tiny import tiny_config, tiny_model


def test_output_of_the_core_shows_its_tensors():
    model = tiny_model(tiny_config(state_retention="all")).train()
    found = []
    model.model.recurrent.register_forward_hook(lambda module, args, output: found.append(output))
    model(torch.arange(3, 9)[None], num_loops=2)
    leaves = tree_flatten(found[0])[0]
    assert any(leaf is found[0].hidden_states for leaf in leaves)
    assert sum(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves) == 3


def gradients(model, ids, loops):
    model.zero_grad()
    model(ids, labels=ids, num_loops=loops, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(rank, port, reshard, checkpointing):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    batches = [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    depths = [(3, 3), (1, 4)]
    model = tiny_model().train()
    whole = [[gradients(model, ids, loops) for ids, loops in zip(batches, pair, strict=True)] for pair in depths]
    expected = [{name: (one[name] + two[name]) / 2 for name in one} for one, two in whole]
    if checkpointing:
        set_activation_checkpointing(model, recurrent="every_2_loops")
    body = model.model
    for unit in (*body.prelude.blocks, *body.coda.blocks, body.recurrent, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    for pair, wanted in zip(depths, expected, strict=True):
        for name, gradient in gradients(model, batches[rank], pair[rank]).items():
            torch.testing.assert_close(gradient.full_tensor(), wanted[name], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_sharded_gradients_are_the_mean_of_the_ranks(reshard, checkpointing):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [in_child(lambda rank=rank: compare(rank, port, reshard, checkpointing)) for rank in (0, 1)]
    assert [wait_for(rank) for rank in ranks] == [0, 0]
