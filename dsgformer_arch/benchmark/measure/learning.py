"""Training runs that differ in the network only, for `training`, `ablation` and `recipe`.

All runs of a seed use the same crops in the same order, with the same flips and
rotations, loss, optimiser and schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsgformer_arch.benchmark.measure.pairs import from_lmdbs
from dsgformer_arch.losses.restoration_loss import FFTLoss
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.protocols import protocol, to_uint8
from dsgformer_arch.restore import final_output, predict, restore, set_memory_format
from dsgformer_arch.utils.errors import UserError

PROTOCOL = """\
The same data, order, crops, flips and 90° rotations for every system of a seed; {loss} loss on the final \
output; AdamW (betas {betas[0]:g} and {betas[1]:g}, weight decay 1e-4), gradient norms clipped at {clip}, \
{warmup:.0%} of the budget linear warm-up to {rate}, then a cosine to 1e-6; crops of {patch}×{patch}, batch \
{batch}, {numbers}. PSNR and SSIM are the means over the held-out images under the protocol `{protocol}` \
({source}), of the weights as they are, without averaging. Validation and set-up count as no training time; \
{clock}."""

WARMUP = 0.05
CLIP = 0.1
FLOOR = 1e-6

Images = list[Image]


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Attributes:
        iterations: length of a run, or None if `seconds` bounds it.
        seconds: the length as a time; exactly one of the two is given.
        batch: crops in a step.
        patch: side of the crops.
        lr: peak of the learning rate.
        validations: how often a run is measured, the end included.
        betas: of AdamW.
        frequency: weight of `FFTLoss` beside L1; 0 for none.
        precision: `'fp32'`, or `'bf16'` for autocast in training.
        protocol: a name in `metrics.PROTOCOLS`, for the held-out images.

    Raises:
        UserError: there is no such protocol.
    """

    iterations: int | None
    seconds: float | None
    batch: int
    patch: int
    lr: float
    validations: int
    betas: tuple[float, float] = (0.9, 0.999)
    frequency: float = 0.0
    precision: str = 'fp32'
    protocol: str = 'gopro'

    def __post_init__(self) -> None:
        protocol(self.protocol)

    def describe(self, rate: str = '') -> str:
        """The protocol in sentences.

        Args:
            rate: what to call the peak learning rate; `lr` itself if empty.
        """
        loss = f'L1 + {self.frequency:g}·FFT' if self.frequency else 'L1'
        numbers = {'fp32': 'float32', 'bf16': 'bfloat16 autocast'}[self.precision]
        return PROTOCOL.format(
            clip=CLIP,
            warmup=WARMUP,
            loss=loss,
            numbers=numbers,
            source=protocol(self.protocol).source,
            rate=rate or f'{self.lr:g}',
            clock='time is CPU time of one thread' if single_thread() else 'time is wall-clock time',
            **vars(self),
        )


def single_thread() -> bool:
    """Whether PyTorch computes on one thread of the CPU.

    CPU time is then what a run costs, and other work on the machine does not change it.
    """
    return torch.get_num_threads() == 1


@dataclass(frozen=True)
class Data:
    """Pairs in memory, uint8 RGB: (sharp, blurred) for training and for validation.

    Attributes:
        train: training pairs.
        test: held-out pairs.
        digest: of all files; equal data, equal digest.
    """

    train: tuple[Images, Images]
    test: tuple[Images, Images]
    digest: str = ''


def read(folder: str | Path, patch: int) -> Data:
    """Read `{train,test}_{gt,lq}.lmdb` of a folder.

    Raises:
        UserError: an LMDB is missing or empty, pairs do not match, or an image is smaller than `patch`.
    """
    splits: dict[str, tuple[Images, Images]] = {}
    digests = []
    for split in ('train', 'test'):
        pairs = from_lmdbs(Path(folder) / split)
        digests.append(pairs.check())
        blurred, sharp = zip(*(pairs.images(key) for key in pairs.keys), strict=True)
        splits[split] = ([*sharp], [*blurred])
    smallest = min(min(image.shape[:2]) for image in splits['train'][0])
    if smallest < patch:
        raise UserError(
            f'--patch is {patch}, but {folder} has training images of {smallest} pixels; lower it'
        )
    return Data(splits['train'], splits['test'], '-'.join(digests))


def batches(pairs: tuple[Images, Images], recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (sharp, blurred) crops, (batch, 3, patch, patch) in [0, 1].

    They depend on the seed only.
    """
    random = np.random.RandomState(seed)
    sharp, blurred = pairs
    while True:
        crops: list[list[NDArray[Any]]] = [[], []]
        for _ in range(recipe.batch):
            i = random.randint(len(sharp))
            height, width = sharp[i].shape[:2]
            top, left = random.randint(height - recipe.patch + 1), random.randint(width - recipe.patch + 1)
            flip, turns = random.randint(2), random.randint(4)
            for kind, images in enumerate((sharp, blurred)):
                crop = images[i][top : top + recipe.patch, left : left + recipe.patch]
                crops[kind].append(np.rot90(crop[:, ::-1] if flip else crop, turns))
        gt, lq = (torch.from_numpy(np.stack(c)).permute(0, 3, 1, 2).float() / 255 for c in crops)
        yield gt, lq


def learning_rate(fraction: float, peak: float) -> float:
    """The rate when `fraction` of the budget is spent."""
    if fraction < WARMUP:
        return peak * max(fraction / WARMUP, 0.02)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARMUP) / (1 - WARMUP))))
    return FLOOR + (peak - FLOOR) * cosine


def train(
    build: Callable[[], nn.Module],
    data: Data,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    tick: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Any]:
    """Train one network once.

    Args:
        build: makes the network; its initial weights follow from `seed`.
        data: what `read` returned.
        recipe: settings of the run.
        seed: of the initial weights and of the order of the data.
        device: where to train.
        tick: called after each iteration with the fraction of the budget that is spent.

    Returns:
        `psnr`, `ssim` of the end, `iterations`, `seconds`, and `curve`, a list of points with
        `iteration`, `seconds`, `psnr`, `ssim`, `loss` (mean since the point before).
    """
    torch.manual_seed(seed)
    network = set_memory_format(build().to(device), torch.channels_last).train()
    offset = getattr(network, 'input_offset', 0.0)
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.lr, betas=recipe.betas, weight_decay=1e-4, fused=True
    )
    frequency_loss = FFTLoss(recipe.frequency)
    stream = batches(data.train, recipe, seed)
    curve: list[dict[str, float]] = []
    losses: list[Tensor] = []
    seconds, iteration, fraction, due = 0.0, 0, 0.0, 1
    clock = time.process_time if device.type == 'cpu' and single_thread() else time.perf_counter
    while fraction < 1:
        gt, lq = (t.to(device).contiguous(memory_format=torch.channels_last) for t in next(stream))
        started = clock()
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(fraction, recipe.lr)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == 'bf16'):
            restored = final_output(network, predict(network, lq, offset))
        loss = nn.functional.l1_loss(restored.float(), gt)
        if recipe.frequency:
            loss = loss + frequency_loss(restored, gt)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        seconds += clock() - started
        iteration += 1
        losses.append(loss.detach())
        fraction = iteration / recipe.iterations if recipe.iterations else seconds / (recipe.seconds or 1)
        if fraction >= due / recipe.validations:
            due = int(fraction * recipe.validations) + 1
            point = {
                'iteration': iteration,
                'seconds': seconds,
                **validate(network, data, device, recipe.protocol),
            }
            curve.append({**point, 'loss': torch.stack(losses).mean().item()})
            losses.clear()
        tick(min(1.0, fraction))
    end = curve[-1]
    return {
        'psnr': end['psnr'],
        'ssim': end['ssim'],
        'iterations': iteration,
        'seconds': seconds,
        'curve': curve,
    }


def validate(network: nn.Module, data: Data, device: torch.device, rules: str = 'gopro') -> dict[str, float]:
    """Mean PSNR and SSIM of the restored held-out images under the protocol of that name."""
    scores = [
        score(to_uint8(restore(network, as_tensor(blurred).to(device))[0].cpu()), sharp, rules)
        for sharp, blurred in zip(*data.test, strict=True)
    ]
    return {key: float(np.mean([s[key] for s in scores])) for key in ('psnr', 'ssim')}


def blurred_scores(data: Data, rules: str = 'gopro') -> dict[str, float]:
    """Mean PSNR and SSIM of the blurred images under the protocol of that name."""
    scores = [score(blurred, sharp, rules) for sharp, blurred in zip(*data.test, strict=True)]
    return {key: float(np.mean([s[key] for s in scores])) for key in ('psnr', 'ssim')}


def score(image: Image, sharp: Image, rules: str = 'gopro') -> dict[str, float]:
    """`psnr` and `ssim` of the protocol of that name, without its other columns."""
    columns = protocol(rules).columns
    pair = [np.ascontiguousarray(i[..., ::-1]) for i in (image, sharp)]
    return {key: columns[key](*pair) for key in ('psnr', 'ssim')}


def as_tensor(image: Image) -> Tensor:
    """(1, 3, H, W) in [0, 1] of uint8 RGB (H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
