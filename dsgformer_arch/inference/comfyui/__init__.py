"""Nodes for ComfyUI: link this folder into ComfyUI's `custom_nodes`, see docs/other-tools.md.

ComfyUI imports the folder by its path and reads `NODE_CLASS_MAPPINGS`.  Its images are tensors (B, H, W, C),
float32 in [0, 1] on the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

import dsgformer_arch
from dsgformer_arch import Deblurrer, zoo
from dsgformer_arch.inference import official_weights

dsgformer_arch.register()

AUTOMATIC = 0
"""Value of `tile` for a size that follows from free memory."""


def models() -> list[str]:
    """Models with weights: those in the package, then official ones (after `dsgformer weights get`)."""
    official = [weights.key for weights in official_weights.TABLE]
    return [*zoo.shipped(), *official]


class Deblur:
    """Restore a batch of images with a system of the zoo."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ('IMAGE',)
    FUNCTION: ClassVar[str] = 'restore'
    CATEGORY: ClassVar[str] = 'image/restoration'
    DESCRIPTION: ClassVar[str] = 'Reduce motion blur; the result has the size of the image.'

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802
        """Inputs and widgets, as ComfyUI asks for them."""
        return {
            'required': {
                'image': ('IMAGE',),
                'model': (models(),),
                'strength': ('FLOAT', {'default': 1.0, 'min': 0.0, 'max': 1.0, 'step': 0.05}),
                'tile': (
                    'INT',
                    {
                        'default': AUTOMATIC, 'min': AUTOMATIC, 'max': 8192, 'step': 64,
                        'tooltip': 'Largest side of the tiles; 0 for what free memory allows.',
                    },
                ),
                'precision': (['auto', 'fp32', 'bf16', 'fp16'],),
            },
            'optional': {
                'weights': (
                    'STRING',
                    {'default': '', 'tooltip': 'A checkpoint; its system is detected.'},
                )
            },
        }  # fmt: skip

    def restore(
        self, image: Tensor, model: str, strength: float, tile: int, precision: str, weights: str = ''
    ) -> tuple[Tensor]:
        """Restore images.

        Args:
            image: (B, H, W, C), floating point; C is 3, or 4 with alpha, which is kept.
            model: one of `models()`; not used where `weights` is given.
            strength: 0 returns the image, 1 the restored one.
            tile: largest side of the tiles in pixels; `AUTOMATIC` for what free memory allows.
            precision: as for `Deblurrer`; `'auto'` is float32 here, since the images are not of 8 bits.
            weights: a checkpoint; empty for that of `model`.

        Returns:
            The restored images in a tuple: the same shape, type and device, in [0, 1].

        Raises:
            UserError: weights that are missing or damaged, or a setting that is not possible here.
        """
        deblurrer = _deblurrer(model, weights, tile, precision)
        deblurrer.strength = strength
        restored = deblurrer.restore(image.detach().cpu().float().clamp(0, 1).numpy())
        return (image.new_tensor(restored),)


@lru_cache(maxsize=2)
def _deblurrer(model: str, weights: str, tile: int, precision: str) -> Deblurrer:
    """The network stays loaded between runs of a workflow."""
    return Deblurrer(
        None if weights else model,
        weights=weights or None,
        tile='auto' if tile == AUTOMATIC else tile,
        precision=precision,
    )


NODE_CLASS_MAPPINGS = {'DSGformerDeblur': Deblur}
NODE_DISPLAY_NAME_MAPPINGS = {'DSGformerDeblur': 'Deblur (DSGformer)'}
