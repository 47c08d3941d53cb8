"""Training and validation of restoration networks: DSGformer and all others of the zoo.

`RestorationModel` extends BasicSR's `SRModel` by what BasicSR 1.4.2 lacks: any
optimizer of torch.optim, warm-up followed by a cosine schedule, gradient
clipping and accumulation, mixed precision, skipping of steps whose gradient is
not finite, networks with several outputs, progressive patch sizes, validation
on images of any size, verified checkpoints, and a JSON record of each
validation.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import os
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsgformer_arch.data.sampler import ITERATION, derived_seed, seed_streams
from dsgformer_arch.models import checkpointing, options
from dsgformer_arch.models.board import samples, strip
from dsgformer_arch.restore import final_output, predict, restore, set_memory_format
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256, write_bytes, write_text
from dsgformer_arch.utils.progress import track
from dsgformer_arch.zoo.checkpoint import Checkpoint, load_into, read_checkpoint

RECIPE = ('optim_g', 'scheduler')
"""Sections of `train` that a resumed run compares with those in its training state."""

AMP_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}

NON_FINITE_STEPS = 10
"""Default of `train: max_skipped_steps`."""


class Interrupted(Exception):  # noqa: N818
    """Raised where a signal arrives during a validation; a resumed run repeats that validation."""


@MODEL_REGISTRY.register()
class RestorationModel(SRModel):
    """Trains and validates any registered network of (N, 3, H, W) to the same size, in [0, 1].

    Options in addition to BasicSR's own (all are in `options/train_gopro.yml`):

    - `train: optim_g: type`: the name of any optimizer in `torch.optim`.
    - `train: scheduler: type`: BasicSR's, this package's (`models/lr_scheduler.py`) or torch's.
    - `train: grad_clip`: max gradient norm; absent for no clipping.
    - `train: accumulate`: number of parts of a batch that are processed one after another; 1 by default.
      The gradient is that of the whole batch, except for layers that use batch statistics.
    - `train: max_skipped_steps`: a step whose loss or gradient is not finite is skipped; this many in a row
      end the run.
    - `train: amp`: `bf16` or `fp16` for autocast (fp16 with loss scaling); absent for float32.
    - `train: channels_last`, `train: compile`: memory format; `torch.compile`.
    - `train: progressive`: `iters`, `batch_sizes`, `gt_sizes`: sizes of each stage (Restormer).
    - `train: *_opt`: each is a loss of LOSS_REGISTRY; they are summed.  A loss whose class has
      `multi_output = True` gets all outputs of the network, any other one the final output; one with
      `needs_input = True` also gets the blurred image.
    - `val: tile`, `val: tile_overlap`, `val: amp`: see `restore`.

    Raises:
        UserError: an option or a checkpoint does not fit.
    """

    stop_requested = False
    """Set (by a signal handler) to save the state after the iteration in progress and to stop."""

    stop_agreed = False
    """Whether any process of the run was asked to stop during the last iteration."""

    # Setup.

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['num_gpu'] != 0 and not torch.cuda.is_available():
            raise UserError(f'num_gpu is {opt["num_gpu"]}, but this machine has no GPU; set it to 0 or auto')
        self.recipe = copy.deepcopy({key: opt['train'][key] for key in RECIPE}) if opt['is_train'] else {}
        self.best_metric_results: dict[str, dict[str, dict[str, Any]]] = {}
        self.improved: set[tuple[str, str]] = set()
        self.position = 0
        self.skipped = self.skipped_in_a_row = 0
        self.images: list[str] = []
        self.suspects: list[str] = []
        self.trained_seconds = 0.0
        self.iteration_started = time.monotonic()
        self.first_iteration: int | None = None
        channels_last = opt['is_train'] and opt['train'].get('channels_last')
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network on the device, in its memory format, and wrap it for several processes."""
        # DistributedDataParallel lays out its gradient buckets by the strides at the time of wrapping.
        return super().model_to_device(set_memory_format(net.to(self.device), self.memory_format))

    def init_training_settings(self) -> None:
        train = self.opt['train']
        self.net_g.train()
        self.amp = AMP_TYPES.get(train.get('amp'))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.ema_decay = train.get('ema_decay', 0)
        if self.ema_decay > 0:
            self.net_g_ema = build_network(self.opt['network_g']).to(self.device)
            self.net_g_ema.load_state_dict(self.get_bare_model(self.net_g).state_dict())
            load_path = self.opt['path'].get('pretrain_network_g')
            if load_path is not None:
                strict = self.opt['path'].get('strict_load_g', True)
                self.load_network(self.net_g_ema, load_path, strict, 'params_ema')
            self.net_g_ema.eval().requires_grad_(False)
        self.losses: dict[str, nn.Module] = {}
        for key, loss in train.items():
            if key.endswith('_opt'):
                self.losses['l_' + key.removesuffix('_opt').removeprefix('pixel_')] = build_loss(loss).to(
                    self.device
                )
        self.setup_optimizers()
        self.setup_schedulers()
        self.input_offset = getattr(self.get_bare_model(self.net_g), 'input_offset', 0.0)
        # Only the call is compiled, so that names in the state dict do not change.
        self.call = torch.compile(self.net_g) if train.get('compile') else self.net_g

    def get_optimizer(self, optim_type: str, params: Iterable[Tensor], lr: float, **kwargs: Any) -> Any:
        optimizer: Any = options.optimizer_class(optim_type)
        if not {'fused', 'foreach'} & set(kwargs) and 'fused' in inspect.signature(optimizer).parameters:
            kwargs['fused'] = True  # one pass over the parameters; available on CPUs and GPUs
        try:
            return optimizer(params, lr, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f'train: optim_g: {optim_type} refuses its settings: {error}') from None

    def setup_schedulers(self) -> None:
        settings = dict(self.opt['train']['scheduler'])
        name: str = settings.pop('type')
        scheduler = options.scheduler_class(name)
        try:
            self.schedulers = [scheduler(optimizer, **settings) for optimizer in self.optimizers]
        except (TypeError, ValueError) as error:
            raise UserError(f'train: scheduler: {name} refuses its settings: {error}') from None

    @master_only
    def print_network(self, net: nn.Module) -> None:
        net = self.get_bare_model(net)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        get_root_logger().info(f'Network: {type(net).__name__}, {parameters:,d} parameters')

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """Load a checkpoint of any common format (see `checkpoint.read_checkpoint`).

        A key that the option file names (`param_key_g`) must exist.  Other keys are defaults of BasicSR:
        a run without EMA saves `params` only, and other projects use `state_dict`.
        """
        try:
            checkpoint = read_checkpoint(load_path, param_key)
        except UserError:
            if param_key is not None and param_key == self.opt['path'].get('param_key_g'):
                raise
            checkpoint = read_checkpoint(load_path)
        if strict:
            check_settings(self.opt['network_g'], checkpoint)
        faults = load_into(self.get_bare_model(net), checkpoint, strict)
        logger = get_root_logger()
        logger.info(f'Loading {type(self.get_bare_model(net)).__name__} from {load_path}')
        if faults:
            logger.warning(f'{load_path} fits only in part: {"; ".join(faults)}')

    # Training.

    def feed_data(self, data: Mapping[str, Any]) -> None:
        self.lq = data['lq'].to(self.device, non_blocking=True)
        self.gt = data['gt'].to(self.device, non_blocking=True) if 'gt' in data else None
        self.images = list(data.get('lq_path', ()))

    def optimize_parameters(self, current_iter: int) -> None:
        """One iteration: forward, all losses, backward, clipping, step, EMA.

        Random numbers of the network (dropout) depend on the seed, the iteration and the rank only.

        Raises:
            UserError: the loss or the gradient was not finite in `max_skipped_steps` iterations in a row.
        """
        if self.first_iteration is None:
            self.first_iteration = current_iter
            self.iteration_started = time.monotonic()
        seed = derived_seed(self.opt.get('manual_seed') or 0, ITERATION, current_iter, self.opt['rank'])
        seed_streams(seed)
        torch.cuda.manual_seed(seed)
        self.shrink_batch(current_iter)
        self.lq = self.lq.contiguous(memory_format=self.memory_format)
        self.optimizer_g.zero_grad(set_to_none=True)
        losses = self.accumulate_gradient()
        self.scaler.unscale_(self.optimizer_g)
        norm = self.clip_gradient()
        if self.agree_on_step(current_iter, torch.stack([*losses.values()]).sum(), norm):
            self.scaler.step(self.optimizer_g)
            if self.ema_decay > 0:
                self.model_ema(self.ema_decay)
        self.scaler.update()
        # Values are copied from the device only when they are printed.
        if current_iter % self.opt['logger']['print_freq'] == 0:
            self.log_dict = self.reduce_loss_dict(losses)
        now = time.monotonic()
        self.trained_seconds += now - self.iteration_started
        self.iteration_started = now

    def accumulate_gradient(self) -> OrderedDict[str, Tensor]:
        """Accumulate the gradient of the batch, part by part; returns the batch's losses by name."""
        assert self.gt is not None
        count = self.lq.shape[0]
        parts = min(self.opt['train'].get('accumulate') or 1, count)
        inputs, targets = self.lq.chunk(parts), self.gt.chunk(parts)
        totals: OrderedDict[str, Tensor] = OrderedDict()
        finals = []
        for number, (lq, gt) in enumerate(zip(inputs, targets, strict=True), 1):
            # Gradients are reduced over processes once, in the last part.
            apart = number < len(inputs) and isinstance(self.net_g, DistributedDataParallel)
            with self.net_g.no_sync() if apart else contextlib.nullcontext():
                with torch.autocast(
                    self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None
                ):
                    outputs = predict(self.call, lq, self.input_offset)
                losses = self.sum_losses(outputs, lq, gt)
                for name in losses:
                    summed = getattr(self.losses[name], 'reduction', 'mean') == 'sum'
                    losses[name] = losses[name] * (1.0 if summed else lq.shape[0] / count)
                self.scaler.scale(torch.stack([*losses.values()]).sum()).backward()
            for name, value in losses.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
            finals.append(final_output(self.get_bare_model(self.net_g), outputs).detach())
        self.output = finals[0] if len(finals) == 1 else torch.cat(finals)
        return totals

    def clip_gradient(self) -> Tensor:
        """Clip the gradient to the norm `train: grad_clip`; returns its norm before."""
        limit = self.opt['train'].get('grad_clip')
        if limit:
            return nn.utils.clip_grad_norm_(self.net_g.parameters(), limit)
        return nn.utils.get_total_norm([p.grad for p in self.net_g.parameters() if p.grad is not None])

    def agree_on_step(self, current_iter: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether loss and gradient are finite in all processes; also sets `stop_agreed`.

        Raises:
            UserError: `max_skipped_steps` iterations in a row were skipped.
        """
        stop = torch.tensor(float(RestorationModel.stop_requested), device=loss.device)
        flags = torch.stack([(~torch.isfinite(loss)).float(), (~torch.isfinite(norm)).float(), stop])
        everywhere = flags.clone()
        if self.opt['dist']:
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
        bad_loss, bad_norm, stop_agreed = everywhere.tolist()
        self.stop_agreed = bool(stop_agreed)
        if not bad_loss and not bad_norm:
            self.skipped_in_a_row = 0
            self.suspects = []
            return True
        # A loss scale that is too large is lowered by the scaler.
        if not bad_loss and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return False
        self.skipped += 1
        self.skipped_in_a_row += 1
        what = 'loss' if bad_loss else 'gradient'
        if flags[0] or not bad_loss:
            self.suspects += [image for image in self.images if image not in self.suspects]
        get_root_logger().warning(
            f'iteration {current_iter}: the {what} is not finite; step skipped ({self.skipped} so far)'
        )
        most = self.opt['train'].get('max_skipped_steps') or NON_FINITE_STEPS
        if self.skipped_in_a_row >= most:
            named = ', '.join(self.suspects[:8]) or 'those of other processes'
            raise UserError(
                f'the {what} was not finite in {most} iterations in a row, up to iteration {current_iter}; '
                f'the images were {named}{" …" if len(self.suspects) > 8 else ""}: check them, lower the '
                f'learning rate or set amp to bf16, then resume with --auto_resume'
            )
        return False

    def sum_losses(self, outputs: Any, lq: Tensor, gt: Tensor) -> OrderedDict[str, Tensor]:
        """Compute each loss, by its name in the log.

        Args:
            outputs: of the network; a tensor or a list of them.
            lq: blurred images, (N, 3, H, W) in [0, 1].
            gt: sharp images, likewise.
        """
        final = final_output(self.get_bare_model(self.net_g), outputs)
        values: OrderedDict[str, Tensor] = OrderedDict()
        for name, loss in self.losses.items():
            prediction = outputs if getattr(loss, 'multi_output', False) else final
            if isinstance(prediction, Tensor):
                prediction = prediction.float()
            extra = [lq] if getattr(loss, 'needs_input', False) else []
            values[name] = loss(prediction, gt, *extra)
        return values

    def shrink_batch(self, current_iter: int) -> None:
        """Progressive learning: take a random batch and crop of the current stage's sizes."""
        stages = self.opt['train'].get('progressive')
        if not stages:
            return
        stage, end = 0, stages['iters'][0]
        while current_iter > end and stage < len(stages['iters']) - 1:
            stage += 1
            end += stages['iters'][stage]
        batch, size = stages['batch_sizes'][stage], stages['gt_sizes'][stage]
        assert self.gt is not None
        if batch < self.lq.shape[0]:
            chosen = random.sample(range(self.lq.shape[0]), batch)
            self.lq, self.gt = self.lq[chosen], self.gt[chosen]
        height, width = self.lq.shape[-2:]
        if size < min(height, width):
            top, left = random.randrange(height - size + 1), random.randrange(width - size + 1)
            window = (..., slice(top, top + size), slice(left, left + size))
            self.lq, self.gt = self.lq[window], self.gt[window]

    @torch.no_grad()
    def model_ema(self, decay: float = 0.999) -> None:
        """EMA of the parameters in one fused call; buffers (running means) are copied."""
        net = self.get_bare_model(self.net_g)
        averages = list(self.net_g_ema.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in net.parameters()], 1 - decay)
        for average, buffer in zip(self.net_g_ema.buffers(), net.buffers(), strict=True):
            average.copy_(buffer)

    # Validation.

    def test(self) -> None:
        """Restore `self.lq` to `self.output`, with the averaged weights if there are any."""
        val = self.opt.get('val') or {}
        network = getattr(self, 'net_g_ema', None) or self.get_bare_model(self.net_g)
        self.output = restore(
            network,
            self.lq,
            precision=val.get('amp') or 'fp32',
            tile=val.get('tile'),
            tile_overlap=val.get('tile_overlap', 32),
        )

    def nondist_validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
        self.dist_validation(dataloader, current_iter, tb_logger, save_img)

    def dist_validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
        """Validate; in distributed training each process takes its share of the images."""
        started = time.monotonic()
        dataset = dataloader.dataset
        share = range(self.opt['rank'], len(dataset), self.opt['world_size'])
        name = dataset.opt['name']
        # The same number of rounds in every process: after each one they agree whether to continue.
        rounds = range(math.ceil(len(dataset) / self.opt['world_size']))
        shown = samples(self.opt)
        rows = []
        for number in track(rounds, f'validating {name}') if self.opt['val'].get('pbar', True) else rounds:
            if number < len(share):
                data = dataset[share[number]]
                row = self.validate_image(data, name, current_iter, save_img, share[number] < shown)
                rows.append(row | {'number': share[number]})
                del self.lq, self.gt, self.output
            if self.opt['is_train'] and self.any_process_stops():
                raise Interrupted
        if self.opt['dist']:
            shares: list[Any] = [None] * self.opt['world_size']
            torch.distributed.all_gather_object(shares, rows)
            rows = [row for part in shares for row in part]
        # Validation does not count as training time.
        self.iteration_started += time.monotonic() - started
        rows.sort(key=lambda row: (row['image'], row['number']))
        for row in rows:
            number, shown_strip = row.pop('number'), row.pop('strip', None)
            if shown_strip is not None and tb_logger:
                tb_logger.image(f'{name}/{number}_{row["image"]}', shown_strip, current_iter)
        if self.opt['rank'] == 0 and self.opt['val'].get('metrics'):
            self.report_validation(name, rows, current_iter, tb_logger)

    def any_process_stops(self) -> bool:
        """Whether any process of the run was asked to stop; a collective call in distributed runs."""
        if not self.opt['dist']:
            return RestorationModel.stop_requested
        flag = torch.tensor(float(RestorationModel.stop_requested), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def validate_image(
        self, data: Mapping[str, Any], dataset: str, current_iter: Any, save_img: bool, shown: bool = False
    ) -> dict:
        """Restore one image, and save it if `save_img`.

        Returns:
            `image`, its name; the metrics of the restored and, as `<metric>_blurred`, of the blurred image;
            and with `shown` `strip`: blurred, restored and sharp (if any) image side by side.
        """
        # LMDB keys and relative paths identify an image; a base name need not be unique.
        image = os.path.splitext(os.path.basename(data['lq_path']))[0]
        self.feed_data({key: data[key][None] for key in ('lq', 'gt') if key in data})
        self.test()
        row: dict[str, Any] = {'image': image}
        finite = bool(torch.isfinite(self.output).all())
        if not finite:
            problem = f'the network returns numbers that are not finite for the image {image}'
            if not self.opt['is_train']:
                raise UserError(f'{problem}; check the checkpoint, or set val: amp to bf16 or fp32')
            get_root_logger().warning(f'{problem}, whose metrics count as NaN')
        restored = tensor2img([torch.nan_to_num(self.output.detach().cpu())])
        if save_img:
            write_image(restored, self.image_path(dataset, image, current_iter))
        blurred = tensor2img([self.lq.cpu()])
        sharp = None if self.gt is None else tensor2img([self.gt.cpu()])
        if shown:
            images = [image[..., ::-1] for image in (blurred, restored, sharp) if image is not None]
            row['strip'] = strip(images)
        if sharp is not None:
            for metric, settings in (self.opt['val'].get('metrics') or {}).items():
                value = float(calculate_metric({'img': restored, 'img2': sharp}, settings))
                row[metric] = value if finite else math.nan
                row[f'{metric}_blurred'] = float(calculate_metric({'img': blurred, 'img2': sharp}, settings))
        return row

    def image_path(self, dataset: str, image: str, current_iter: Any) -> str:
        folder = self.opt['path']['visualization']
        if self.opt['is_train']:
            return os.path.join(folder, image, f'{image}_{current_iter}.png')
        suffix = self.opt['val'].get('suffix') or self.opt['name']
        return os.path.join(folder, dataset, f'{image}_{suffix}.png')

    def report_validation(self, dataset: str, rows: list[dict], current_iter: Any, tb_logger: Any) -> None:
        """Log the means, update the best ones, and write all values to `metrics_<dataset>.json`."""
        if not rows:
            raise UserError(f'the data set {dataset} has no images to validate on')
        metrics = list(self.opt['val']['metrics'])
        names = [name for metric in metrics for name in (metric, f'{metric}_blurred') if name in rows[0]]
        means = {name: float(np.mean([row[name] for row in rows])) for name in names}
        self.metric_results = {metric: means[metric] for metric in metrics if metric in means}
        if dataset not in self.best_metric_results:
            self._initialize_best_metric_results(dataset)
        lines = [f'Validation {dataset}, {len(rows)} images']
        for metric, value in self.metric_results.items():
            self._update_best_metric_result(dataset, metric, value, current_iter)
            best = self.best_metric_results[dataset][metric]
            if best['iter'] == current_iter:
                self.improved.add((dataset, metric))
            line = f'\t # {metric}: {value:.4f} (blurred: {means[f"{metric}_blurred"]:.4f})'
            if self.opt['is_train']:
                line += f'\tBest: {best["val"]:.4f} @ {best["iter"]} iter'
            lines.append(line)
            if tb_logger:
                tb_logger.scalars({f'metrics/{dataset}/{metric}': value}, current_iter)
        get_root_logger().info('\n'.join(lines))
        record = {'dataset': dataset, 'iteration': current_iter, 'means': means, 'images': rows}
        write_json(record, os.path.join(self.opt['path']['log'], f'metrics_{dataset}.json'))

    # Checkpoints.

    def save(self, epoch: int, current_iter: int) -> None:
        """Save a checkpoint: the network, then the training state, which completes it.

        Args:
            epoch: for the state.
            current_iter: the iteration; -1 saves the network only, as `latest`.

        Raises:
            UserError: a file cannot be written, or a weight is not finite.
        """
        started = time.monotonic()
        self.save_networks(current_iter)
        self.save_training_state(epoch, current_iter)
        self.save_record(current_iter)
        self.iteration_started += time.monotonic() - started

    def save_networks(self, label: int | str) -> None:
        """Save the network and its average as `net_g_<label>.pth`."""
        networks = {'params': self.net_g}
        if hasattr(self, 'net_g_ema'):
            networks['params_ema'] = self.net_g_ema
        self.save_network([*networks.values()], 'net_g', label, [*networks])

    @master_only
    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int | str,
        param_key: str | list[str] = 'params',
    ) -> None:
        """Save networks under their keys, and the settings that build them as `network`."""
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content: dict[str, Any] = {
            key: {name: tensor.cpu() for name, tensor in self.get_bare_model(network).state_dict().items()}
            for network, key in zip(nets, keys, strict=True)
        }
        for key in keys:
            for name, tensor in content[key].items():
                if not torch.isfinite(tensor).all():
                    raise UserError(
                        f'{name} of the network ({key}) is not finite: no checkpoint was saved; lower '
                        'the learning rate and resume from the last one with --auto_resume'
                    )
        content['network'] = _plain(self.opt['network_g'])
        label = 'latest' if current_iter == -1 else current_iter
        checkpointing.write(content, os.path.join(self.opt['path']['models'], f'{net_label}_{label}.pth'))

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        if current_iter == -1:
            return
        paths = self.opt['path']
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'scaler': self.scaler.state_dict(),
            'seconds': self.trained_seconds,
            'position': self.position,
            'best': self.best_metric_results,
            'skipped': [self.skipped, self.skipped_in_a_row],
            'recipe': _plain(self.recipe),
            'files': {'network': sha256(checkpointing.network_path(paths['models'], current_iter))},
        }
        checkpointing.write(state, checkpointing.state_path(paths['training_states'], current_iter))

    @master_only
    def save_record(self, current_iter: int) -> None:
        """`training.json`: iterations done and seconds spent in them, validation and saving left out."""
        done = self.schedulers[0].last_epoch + 1 if current_iter == -1 else current_iter
        record = {
            'iterations': done,
            'total_iterations': self.opt['train']['total_iter'],
            'seconds': self.trained_seconds,
            'skipped_steps': self.skipped,
        }
        write_json(record, os.path.join(self.opt['path']['experiments_root'], 'training.json'))

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Restore optimizer, schedule, loss scale, best metrics and time from a training state.

        Settings that have changed in the option file since apply from now on; each change is logged.

        Raises:
            UserError: the state does not fit the network, the optimizer or the schedule.
        """
        path = self.opt['path'].get('resume_state') or 'the training state'
        optimizers, schedulers = resume_state['optimizers'], resume_state['schedulers']
        if (len(optimizers), len(schedulers)) != (len(self.optimizers), len(self.schedulers)):
            raise checkpointing.DamagedError(f'{path} belongs to another kind of run')
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            checkpointing.check_optimizer_state(optimizer, state, path)
        for scheduler, state in zip(self.schedulers, schedulers, strict=True):
            public = {key for key in state if not key.startswith('_')} if isinstance(state, dict) else {''}
            if not public <= set(scheduler.state_dict()):
                raise checkpointing.DamagedError(
                    f'{path} holds the state of another schedule than train: scheduler: type'
                )
        changes = self.changed_settings(resume_state.get('recipe') or {})
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            new = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            checkpointing.match_memory_format(optimizer)
            for group, before in zip(optimizer.param_groups, new, strict=True):
                for key in changes['optim_g']:
                    if key == 'lr':  # the current value is a point of the schedule
                        group['lr'] *= before['initial_lr'] / group['initial_lr']
                        group['initial_lr'] = before['initial_lr']
                    elif key in group:
                        group[key] = before[key]
        kept = set(changes['scheduler']) | ({'base_lrs'} if 'lr' in changes['optim_g'] else set())
        for scheduler, state in zip(self.schedulers, schedulers, strict=True):
            scheduler.load_state_dict({key: value for key, value in state.items() if key not in kept})
        self.trained_seconds = resume_state.get('seconds', 0.0)
        if 'scaler' in resume_state:
            self.scaler.load_state_dict(resume_state['scaler'])
        self.best_metric_results = resume_state.get('best') or {}
        self.skipped, self.skipped_in_a_row = resume_state.get('skipped') or (0, 0)

    def changed_settings(self, before: Mapping[str, Any]) -> dict[str, list[str]]:
        """The keys of each section of `RECIPE` that differ from a saved recipe."""
        changes: dict[str, list[str]] = {section: [] for section in RECIPE}
        for section, old in before.items():
            new = self.recipe.get(section, {})
            for key in sorted(set(old) | set(new)):
                if old.get(key) != new.get(key):
                    changes[section].append(key)
                    get_root_logger().warning(
                        f'train: {section}: {key} was {old.get(key)} and is {new.get(key)} from now on'
                    )
        return changes


NOT_THE_FUNCTION = ('recompute', 'alpha_init', 'weights_init', 'output_init')
"""Settings of a network that change its memory or its initial weights, not what it computes from weights."""


def check_settings(settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Check that a checkpoint was trained with the settings that the option file gives the network.

    Some of them, such as DSGformer's `score`, leave no trace in the shapes of the weights.

    Args:
        settings: the option file's `network_g`.
        checkpoint: one that training wrote holds its settings.

    Raises:
        UserError: they contradict each other.
    """
    trained = checkpoint.network
    if trained is None:
        return
    defaults: dict[str, Any] = {}
    if settings['type'] in ARCH_REGISTRY:
        parameters = inspect.signature(ARCH_REGISTRY.get(settings['type'])).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    ours, theirs = _plain({**defaults, **settings}), _plain({**defaults, **trained})
    for key in sorted(set(ours) | set(theirs)):
        if key not in NOT_THE_FUNCTION and ours.get(key) != theirs.get(key):
            raise UserError(
                f'{checkpoint.path} was trained with {key}: {theirs.get(key)}, but network_g: {key} is '
                f'{ours.get(key)}; set it to the former, or strict_load_g to false'
            )


def write_image(image: np.ndarray, path: str) -> None:
    """Write an image as PNG, atomically.

    Args:
        image: uint8 BGR (H, W, 3).
        path: the file; its folder is created.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_bytes(cv2.imencode('.png', image)[1].tobytes(), path)


def write_json(content: Any, path: str) -> None:
    """Write JSON, atomically; NaN as null."""
    write_text(json.dumps(_plain(content), indent=2) + '\n', path)


def _plain(value: Any) -> Any:
    """Convert to plain dicts and lists, NaN to None, for JSON and for `weights_only` loading."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@MODEL_REGISTRY.register()
class DSGformerModel(RestorationModel):
    """Former name of `RestorationModel`, still accepted in option files."""
