"""One system of each architecture, at the smallest sizes that still have all its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsgformer_arch import zoo
from tests.conformance.check import fill_state_dict

SMALL: dict[str, dict[str, Any]] = {
    'dsgformer': {'width': 16, 'num_blocks': (1, 2, 1, 1)},
    'mhnet': {'width': 16, 'num_cab': 1, 'enc_blk_nums': (1, 1, 1, 2)},
    'mprnet': {'n_feat': 8, 'scale_unetfeats': 4, 'scale_orsnetfeats': 4, 'num_cab': 1},
    'restormer': {'dim': 8, 'num_blocks': [1, 2, 1, 1], 'num_refinement_blocks': 1},
    'stripformer': {'channels': (8, 16, 64), 'decoder_channels': 64, 'num_blocks': (2, 2)},
    'convir_s': {'num_res': 2, 'base_channel': 8, 'dilations': (1, 2, 3)},
    'mb_taylorformer_v2_b': {'dim': (8, 16, 16, 16), 'num_blocks': (1, 1, 1, 1)},
    'nafnet32': {'width': 8, 'enc_blk_nums': (1, 2), 'dec_blk_nums': (1, 1)},
    'drsformer': {'dim': 16, 'num_blocks': (1, 2, 1, 1)},
    'fftformer': {'dim': 8, 'num_blocks': [1, 2, 1], 'num_refinement_blocks': 1},
    'ipt': {'n_feats': 8, 'num_layers': 1, 'num_heads': 4, 'num_queries': 1},
}

TRACELESS: dict[str, dict[str, Any]] = {'convir_s': {'dilations': (1, 2, 3)}, 'ipt': {'num_heads': 4}}
"""What of these settings no weight's shape tells."""


FRESH = {'ipt', 'mb_taylorformer_v2_b'}
"""Systems that keep their first weights: IPT's hold a range of values, MB-TaylorFormer's chaos
follows others.
"""


def small(name: str, **overrides: Any) -> nn.Module:
    """A small system with weights that do not vanish, in evaluation mode."""
    torch.manual_seed(0)
    network = zoo.create(name, **{**SMALL[name], **overrides}).eval()
    return network if name in FRESH else fill_state_dict(network, seed=3, gain=0.7)


def outputs(network: nn.Module, *arguments: Any) -> list[Any]:
    """What a network returns, as a list."""
    found = network(*arguments)
    return list(found) if isinstance(found, (list, tuple)) else [found]


def save_gentle_weights(path: Path) -> Path:
    """Write a checkpoint of a small DSGformer whose result differs from its input, but by little."""
    network: Any = small('dsgformer')
    network.tail.weight.data *= 0.05
    torch.save({'params': network.state_dict()}, path)
    return path
