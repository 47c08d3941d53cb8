"""Blur made while training: what `tools/synthesize_blur.py` writes, one crop at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY

from dsgformer_arch.data.mixed_dataset import MixedDataset


@DATASET_REGISTRY.register()
class SyntheticBlurDataset(MixedDataset):
    """Crops of sharp photographs (or frames) that are blurred as they are drawn.

    Options are those of `MixedDataset` with one source instead of several:

        synthesis: `kind` (shake, objects or video) and the settings of that kind's class in
            `data.prepare.blur.sources`.
    """

    required = ('name', 'type', 'gt_size', 'length', 'synthesis')
    options = ('synthesis', 'length', 'seed')

    @classmethod
    def source_options(cls, opt: Mapping[str, Any]) -> Mapping[str, Any]:
        synthesis = opt['synthesis']
        if not isinstance(synthesis, Mapping):
            return {'synthesis': synthesis}
        return {'synthesis': {**synthesis, 'weight': 1.0}}
