"""Losses of the compared systems that BasicSR lacks, registered in LOSS_REGISTRY.

The losses of the official implementations, by their names in an option file (L1Loss is BasicSR's):

    MPRNet                CharbonnierRootLoss + 0.05 EdgeLoss, each summed over its three outputs
    Restormer, DRSformer  L1Loss
    NAFNet, MHNet         PSNRLoss
    FFTformer             L1Loss + 0.1 FFTLoss
    MB-TaylorFormer V2    L1Loss + 0.1 FFTLoss
    ConvIR                L1Loss + 0.1 FFTLoss, each summed over its three scales
    Stripformer           CharbonnierRootLoss + 0.05 EdgeLoss + 0.0005 ContrastLoss

All compare a restored image with the sharp one, (N, C, H, W) in [0, 1], and return a scalar.  Half and
bfloat16 images are compared in float32, also within autocast, for the precision of squares and sums.

Two class attributes declare further inputs of a loss: `multi_output`, all outputs of the network instead
of the restored image; `needs_input`, the degraded image as a third argument.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.losses import build_loss
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torchvision.models import VGG19_Weights

from dsgformer_arch.utils.errors import UserError


def charbonnier(difference: Tensor, eps: float) -> Tensor:
    """√(d² + ε²), elementwise: |d|, smooth at zero."""
    return (difference.square() + eps * eps).sqrt()


class RestorationLoss(nn.Module):
    """A loss of a restored image and the sharp one: `loss_weight` × the mean or sum of `values`.

    Args:
        loss_weight: factor of the loss.
        reduction: `'mean'` or `'sum'`.

    Raises:
        UserError: for another reduction.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = 'mean') -> None:
        super().__init__()
        if reduction not in ('mean', 'sum'):
            raise UserError(f"{type(self).__name__}: reduction is {reduction!r}; give 'mean' or 'sum'")
        self.loss_weight = loss_weight
        self.reduction = reduction

    def values(self, pred: Tensor, target: Tensor) -> Tensor:
        """The values to average: of any shape, float32 or float64 like the arguments."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(pred.device.type, enabled=False):
            values = self.values(_promoted(pred), _promoted(target))
            return self.loss_weight * (values.mean() if self.reduction == 'mean' else values.sum())


@LOSS_REGISTRY.register()
class CharbonnierRootLoss(RestorationLoss):
    """√((restored - sharp)² + ε²), averaged.

    As in the official implementations of MPRNet, MHNet, Restormer and Stripformer (losses.py).  BasicSR's
    `CharbonnierLoss` adds ε where they add ε²: it is this loss if its `eps` is this one's squared.

    Args:
        loss_weight: factor of the loss.
        eps: ε, on the scale of the image.
        reduction: `'mean'` or `'sum'`.
    """

    def __init__(self, loss_weight: float = 1.0, eps: float = 1e-3, reduction: str = 'mean') -> None:
        super().__init__(loss_weight, reduction)
        self.eps = eps

    def values(self, pred: Tensor, target: Tensor) -> Tensor:
        return charbonnier(pred - target, self.eps)


@LOSS_REGISTRY.register()
class EdgeLoss(RestorationLoss):
    """Difference of the finest levels of the two images' Laplacian pyramids.

    As in the official implementations of MPRNet and Stripformer (losses.py): the level is the image minus its
    low frequencies, which are the image blurred with Burt and Adelson's 5×5 kernel, halved and doubled again.
    FFTformer's uses the magnitude of the difference instead of Charbonnier's penalty.

    Args:
        loss_weight: factor of the loss.
        penalty: `'charbonnier'` or `'l1'`.
        eps: Charbonnier's ε.
        reduction: `'mean'` or `'sum'`.

    Raises:
        UserError: for another penalty.
    """

    TAPS = (0.05, 0.25, 0.4, 0.25, 0.05)

    def __init__(
        self,
        loss_weight: float = 1.0,
        penalty: str = 'charbonnier',
        eps: float = 1e-3,
        reduction: str = 'mean',
    ) -> None:
        super().__init__(loss_weight, reduction)
        if penalty not in ('charbonnier', 'l1'):
            raise UserError(f"EdgeLoss: penalty is {penalty!r}; give 'charbonnier' or 'l1'")
        self.penalty = penalty
        self.eps = eps

    def values(self, pred: Tensor, target: Tensor) -> Tensor:
        # The level is linear in the image: the difference of two levels is the level of the difference.
        edges = self.laplacian(pred - target)
        return edges.abs() if self.penalty == 'l1' else charbonnier(edges, self.eps)

    def laplacian(self, image: Tensor) -> Tensor:
        """The pyramid's finest level, (N, C, H, W) to the same."""
        low = torch.zeros_like(image)
        low[..., ::2, ::2] = 4 * self.blur(image)[..., ::2, ::2]
        return image - self.blur(low)

    def blur(self, image: Tensor) -> Tensor:
        taps = image.new_tensor(self.TAPS)
        planes = F.pad(image.flatten(0, 1)[:, None], (2, 2, 2, 2), 'replicate')
        return F.conv2d(planes, torch.outer(taps, taps)[None, None]).reshape_as(image)


@LOSS_REGISTRY.register()
class FFTLoss(RestorationLoss):
    """L1 distance of the two images' Fourier transforms, real and imaginary parts apart.

    As in the official implementations of MIMO-UNet, ConvIR, FFTformer and MB-TaylorFormer V2: the mean
    runs over all H×W frequencies, and the transform is not normalised, so that the loss grows as √(H·W).

    Args:
        loss_weight: factor of the loss.
        reduction: `'mean'` or `'sum'`.
    """

    def values(self, pred: Tensor, target: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(pred - target)).abs()


@LOSS_REGISTRY.register()
class PSNRLoss(RestorationLoss):
    """Negative PSNR in dB, 10·log₁₀(MSE + 1e-8) of each image, averaged over the batch.

    As in the official implementations of NAFNet (basicsr/models/losses/losses.py) and MHNet (losses.py).

    Args:
        loss_weight: factor of the loss.
        toY: compare the luma of BT.601, in its range 16–235 of 255, instead of RGB.
        reduction: `'mean'` or `'sum'` over the images.
    """

    LUMA = (65.481, 128.553, 24.966)
    """Weights of R, G and B in [0, 1] in a luma of 16 to 235."""

    def __init__(self, loss_weight: float = 1.0, toY: bool = False, reduction: str = 'mean') -> None:
        super().__init__(loss_weight, reduction)
        self.toY = toY

    def values(self, pred: Tensor, target: Tensor) -> Tensor:
        difference = pred - target
        if self.toY:
            difference = torch.einsum('nchw,c->nhw', difference, difference.new_tensor(self.LUMA) / 255)
        mse = difference.square().flatten(1).mean(1)
        return 10 / math.log(10) * (mse + 1e-8).log()


@LOSS_REGISTRY.register()
class ContrastLoss(nn.Module):
    """Pulls the restored image towards the sharp one and away from the blurred one, in VGG-19 features.

    As in Stripformer's official implementation (models/losses.py).  With f the features relu3_1, and
    d(a, b) the mean over the channels of |f(a) - f(b)|:

        Σ M · d(restored, sharp) / (d(restored, blurred) + 1e-7)  /  Σ M

    M is 1 where sharp and blurred differ by more than 0.01 on average over the channels, 0 elsewhere,
    reduced to the features' size.  If they never differ the official implementation divides by zero;
    here it is 0.

    Args:
        loss_weight: factor of the loss.
        vgg_weights: file of torchvision's VGG-19 weights; without it torchvision downloads them (548 MB)
            to its cache, or finds them there.
        image_offset: subtracted from the images before the network; the official implementation has images in
            [-0.5, 0.5] and does not normalise them further.

    Raises:
        UserError: if the weights can neither be read nor downloaded.
    """

    needs_input = True
    THRESHOLD = 0.01

    def __init__(
        self, loss_weight: float = 1.0, vgg_weights: str | None = None, image_offset: float = 0.5
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.image_offset = image_offset
        self.vgg = _vgg19_to_relu3_1(vgg_weights)

    def forward(self, pred: Tensor, target: Tensor, degraded: Tensor) -> Tensor:
        """The loss.

        Args:
            pred: restored image, (N, 3, H, W) in [0, 1].
            target: sharp image, like `pred`.
            degraded: the network's input, like `pred`.
        """
        with torch.autocast(pred.device.type, enabled=False):
            dtype = next(self.vgg.parameters()).dtype
            pred, target, degraded = (image.to(dtype) for image in (pred, target, degraded))
            with torch.no_grad():
                sharp, blurred = self.features(target), self.features(degraded)
                changed = (target - degraded).abs().mean(1, keepdim=True) > self.THRESHOLD
                mask = F.interpolate(changed.to(dtype), scale_factor=0.25, mode='bilinear')
            restored = self.features(pred)
            positive = (restored - sharp).abs().mean(1, keepdim=True)
            negative = (restored - blurred).abs().mean(1, keepdim=True)
            ratio = positive / (negative + 1e-7)
            total = mask.sum().clamp_min(torch.finfo(dtype).tiny)
            return self.loss_weight * (ratio * mask).sum() / total

    def features(self, image: Tensor) -> Tensor:
        return self.vgg(image - self.image_offset)


@LOSS_REGISTRY.register()
class MultiScaleLoss(nn.Module):
    """Another loss, summed over several outputs of a network, each against the target at its size.

    Sums over outputs of one size are MPRNet's (train.py), over three sizes ConvIR's and MIMO-UNet's
    (train.py): the target is reduced bilinearly by a whole factor, without smoothing.

    Args:
        base: options of the loss to sum: its `type` in LOSS_REGISTRY and its arguments.
        weights: one per output, in the network's order; 1 by default.
        loss_weight: factor of the sum.

    Raises:
        UserError: for a base that is not registered or takes more than two images.
    """

    multi_output = True

    def __init__(
        self, base: Mapping[str, Any], weights: Sequence[float] | None = None, loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        name = base.get('type')
        if name not in LOSS_REGISTRY:
            known = ', '.join(sorted(LOSS_REGISTRY.keys()))
            raise UserError(f'MultiScaleLoss: base has the type {name!r}; choose one of {known}')
        if getattr(LOSS_REGISTRY.get(name), 'needs_input', False):
            raise UserError(
                f'MultiScaleLoss: {name} needs the degraded image and cannot be a base; use it alone'
            )
        self.base = build_loss(dict(base))
        self.weights = weights
        self.loss_weight = loss_weight

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The sum.

        Args:
            outputs: (N, C, H/f, W/f) each, with a whole f of its own; a single tensor counts as one.
            target: (N, C, H, W).

        Raises:
            UserError: if weights and outputs differ in number, or an output's size does not divide H×W.
        """
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        weights = [1.0] * len(outputs) if self.weights is None else self.weights
        if len(weights) != len(outputs):
            raise UserError(
                f'MultiScaleLoss: {len(weights)} weights for {len(outputs)} outputs; give one for each output'
            )
        losses = [
            weight * self.base(_promoted(output), _promoted(_reduced_to(target, output.shape[-2:])))
            for weight, output in zip(weights, outputs, strict=True)
        ]
        return self.loss_weight * torch.stack(losses).sum()


def _promoted(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _reduced_to(target: Tensor, size: Sequence[int]) -> Tensor:
    """`target`, reduced bilinearly to a `size` that divides its own by the same factor in both directions."""
    (h, w), (height, width) = size, target.shape[-2:]
    if (h, w) == (height, width):
        return target
    if height % h or width % w or height // h != width // w:
        raise UserError(
            f'MultiScaleLoss: an output of {h}×{w} is not a whole fraction of the target of {height}×{width}'
            '; choose another size of crops or another loss'
        )
    return F.interpolate(_promoted(target), size=(h, w), mode='bilinear')


def _vgg19_to_relu3_1(path: str | None) -> nn.Sequential:
    """VGG-19 up to relu3_1, frozen.  (N, 3, H, W) to (N, 256, H/4, W/4)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, None, 128, 128, None, 256):
        if width is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    vgg = nn.Sequential(*layers)
    state = _vgg19_state(path)
    try:
        vgg.load_state_dict({key: state[f'features.{key}'] for key in vgg.state_dict()})
    except (KeyError, TypeError, RuntimeError):
        raise UserError(
            f'ContrastLoss: {path or "the download"} does not hold the weights of VGG-19; '
            'give the file that torchvision offers'
        ) from None
    return vgg.requires_grad_(False)


def _vgg19_state(path: str | None) -> Mapping[str, Tensor]:
    if path is not None:
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f'ContrastLoss: the VGG-19 weights {path} cannot be read ({type(error).__name__}); '
                'give the file that torchvision offers as vgg_weights'
            ) from error
    weights = VGG19_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or a download that fails its checksum
        raise UserError(
            f'ContrastLoss: the VGG-19 weights cannot be downloaded from {weights.url} ({error}); '
            f'put that file into {torch.hub.get_dir()}/checkpoints, or name its place as vgg_weights'
        ) from error
