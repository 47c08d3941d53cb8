"""The renderings by kind of record, in the order of the report."""

from dsgformer_arch.benchmark.render import (
    ablation,
    cost,
    latency,
    loader,
    quality,
    recipe,
    speed,
    training,
)
from dsgformer_arch.benchmark.render.rendering import Rendering

RENDERINGS: dict[str, Rendering] = {
    'quality': quality.RENDERING,
    'speed': speed.RENDERING,
    'cost': cost.RENDERING,
    'latency': latency.RENDERING,
    'training': training.RENDERING,
    'ablation': ablation.RENDERING,
    'recipe': recipe.RENDERING,
    'loader': loader.RENDERING,
}
