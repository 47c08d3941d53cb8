"""Training in two processes over gloo, against one process with the same global batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.test_restoration_model import batch, build, step

ITERATIONS = 3
FLAGS = (False, True)


def trained(rank: int, world_size: int, folder: Path, unused: bool) -> list[dict[str, Tensor]]:
    """The gradients of each iteration, with this process's share of the batch."""
    torch.manual_seed(0)
    model = build(
        folder,
        dist=world_size > 1,
        rank=rank,
        world_size=world_size,
        find_unused_parameters=unused,
        train={
            'channels_last': True,
            'ema_decay': 0,
            'grad_clip': 0.1,
            'optim_g': {'type': 'SGD', 'lr': 0.1},
        },
    )
    share = {key: value[rank::world_size] for key, value in batch(4).items()}
    gradients = []
    for iteration in range(1, ITERATIONS + 1):
        step(model, share, iteration)
        net = model.get_bare_model(model.net_g)
        gradients.append({name: p.grad.contiguous().clone() for name, p in net.named_parameters()})
    return gradients


def one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    for unused in FLAGS:
        gradients = trained(rank, 2, folder, unused)
        if rank == 0:
            torch.save(gradients, folder / f'gradients_{unused}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason='the processes are forked, which CUDA does not allow')
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """With `channels_last`: the memory format has to be set before the network is wrapped."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (port, tmp_path), nprocs=2, start_method='fork')
    for unused in FLAGS:
        alone = trained(0, 1, tmp_path, unused)
        together = torch.load(tmp_path / f'gradients_{unused}.pt', weights_only=True)
        for iteration, (expected, found) in enumerate(zip(alone, together, strict=True), 1):
            for name, gradient in expected.items():
                scale = gradient.abs().max().item()
                torch.testing.assert_close(
                    found[name],
                    gradient,
                    rtol=0,
                    atol=1e-4 * scale + 1e-8,
                    msg=f'{name}, iteration {iteration}',
                )
