"""How a restoration network is trained and validated; not only DSGformer.

`RestorationModel` is BasicSR's `SRModel` with what deblurring needs and BasicSR
1.4.2 lacks: AdamW and any other optimiser of torch, a warm-up that ends where
the cosine begins, clipped gradients, bf16 autocast, networks with several
outputs, progressive patch sizes, pictures of any size, checkpoints that are
whole or absent, and a record of each validation that programs can read.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric
from basicsr.models import lr_scheduler as basicsr_schedulers
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from dsgformer_arch.models import lr_scheduler
from dsgformer_arch.restore import final_output, order_memory, predict, restore
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically
from dsgformer_arch.utils.progress import track
from dsgformer_arch.zoo.checkpoint import load_into, read_checkpoint

AMP_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class Interrupted(Exception):  # noqa: N818
    """Raised after the training state was saved because somebody asked the run to stop."""


@MODEL_REGISTRY.register()
class RestorationModel(SRModel):
    """Trains and validates any registered network of (N, 3, H, W) to the same size, in [0, 1].

    Options, beside BasicSR's own (`options/train_gopro.yml` shows each):

    - `train: optim_g: type`: the name of any optimiser in `torch.optim`.
    - `train: scheduler: type`: BasicSR's, this package's (`models/lr_scheduler.py`) or torch's.
    - `train: grad_clip`: largest norm of the gradient; absent for none.
    - `train: amp`: `bf16` or `fp16` for autocast (fp16 with loss scaling); absent for float32.
    - `train: channels_last`, `train: compile`: memory format; `torch.compile`.
    - `train: progressive`: `iters`, `batch_sizes`, `gt_sizes`, the patch sizes by stage (Restormer).
    - `train: *_opt`: each is a loss of LOSS_REGISTRY; all are summed.  A loss whose class says
      `multi_output = True` is given all outputs of the network, any other one the final output; one that
      says `needs_input = True` is given the blurred image too.
    - `val: tile`, `val: tile_overlap`, `val: amp`: see `restore`.

    Raises:
        UserError: an option or a checkpoint does not fit.
    """

    stop_requested = False
    """Set (by a signal handler) to save the state after the iteration in progress and to stop."""

    # Setting up.

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['num_gpu'] != 0 and not torch.cuda.is_available():
            raise UserError(f'num_gpu is {opt["num_gpu"]}, but this machine has no GPU; set it to 0 or auto')
        self.trained_seconds = 0.0
        self.iteration_started = time.monotonic()
        self.first_iteration: int | None = None
        channels_last = opt['is_train'] and opt['train'].get('channels_last')
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network on the device, in its memory format, and wrap it for several processes."""
        # DistributedDataParallel lays out its gradient buckets by the strides that it finds when it wraps.
        return super().model_to_device(order_memory(net.to(self.device), self.memory_format))

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
        # What is compiled is only the call: names in the state dict stay as they are.
        self.call = torch.compile(self.net_g) if train.get('compile') else self.net_g

    def get_optimizer(self, optim_type: str, params: Iterable[Tensor], lr: float, **kwargs: Any) -> Any:
        optimiser: Any = getattr(torch.optim, optim_type, None)
        if not _is_optimizer(optimiser):
            raise UserError(f'train: optim_g: type: torch.optim has no {optim_type!r}; take AdamW, say')
        if not {'fused', 'foreach'} & set(kwargs) and 'fused' in inspect.signature(optimiser).parameters:
            kwargs['fused'] = True  # one pass over the parameters; CPUs and GPUs have it
        try:
            return optimiser(params, lr, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f'train: optim_g: {optim_type} refuses its settings: {error}') from None

    def setup_schedulers(self) -> None:
        settings = dict(self.opt['train']['scheduler'])
        name: str = settings.pop('type')
        # BasicSR's own class under torch's name; it also restarts.
        name = 'MultiStepRestartLR' if name == 'MultiStepLR' else name
        for module in (lr_scheduler, basicsr_schedulers, torch.optim.lr_scheduler):
            scheduler = getattr(module, name, None)
            if scheduler is not None:
                break
        else:
            raise UserError(f'train: scheduler: type: {name!r} is unknown; take WarmupCosineLR, say')
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
        """Load a checkpoint of any usual form, as data (see `checkpoint.read_checkpoint`)."""
        try:
            checkpoint = read_checkpoint(load_path, param_key)
        except UserError:
            # A release may hold `state_dict` only, and a run without EMA `params` only.
            checkpoint = read_checkpoint(load_path)
        faults = load_into(self.get_bare_model(net), checkpoint, strict)
        logger = get_root_logger()
        logger.info(f'Loading {type(self.get_bare_model(net)).__name__} from {load_path}')
        if faults:
            logger.warning(f'{load_path} fits only in part: {"; ".join(faults)}')

    # Training.

    def feed_data(self, data: Mapping[str, Any]) -> None:
        self.lq = data['lq'].to(self.device, non_blocking=True)
        self.gt = data['gt'].to(self.device, non_blocking=True) if 'gt' in data else None

    def optimize_parameters(self, current_iter: int) -> None:
        """One iteration: forward, all losses, backward, clipping, step, EMA."""
        if self.first_iteration is None:
            self.first_iteration = current_iter
            self.iteration_started = time.monotonic()
        self.shrink_batch(current_iter)
        self.lq = self.lq.contiguous(memory_format=self.memory_format)
        self.optimizer_g.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            outputs = predict(self.call, self.lq, self.input_offset)
        losses = self.sum_losses(outputs)
        self.scaler.scale(torch.stack([*losses.values()]).sum()).backward()
        if self.opt['train'].get('grad_clip'):
            self.scaler.unscale_(self.optimizer_g)
            nn.utils.clip_grad_norm_(self.net_g.parameters(), self.opt['train']['grad_clip'])
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        self.output = final_output(self.get_bare_model(self.net_g), outputs).detach()
        # Values are fetched from the device only when they are printed, not at each iteration.
        if current_iter % self.opt['logger']['print_freq'] == 0:
            self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(self.ema_decay)
        now = time.monotonic()
        self.trained_seconds += now - self.iteration_started
        self.iteration_started = now
        if RestorationModel.stop_requested and not self.opt['dist']:
            raise Interrupted

    def sum_losses(self, outputs: Any) -> OrderedDict[str, Tensor]:
        """Each loss by its name in the log, of the network's outputs against the sharp image."""
        final = final_output(self.get_bare_model(self.net_g), outputs)
        values: OrderedDict[str, Tensor] = OrderedDict()
        for name, loss in self.losses.items():
            prediction = outputs if getattr(loss, 'multi_output', False) else final
            if isinstance(prediction, Tensor):
                prediction = prediction.float()
            extra = [self.lq] if getattr(loss, 'needs_input', False) else []
            values[name] = loss(prediction, self.gt, *extra)
        return values

    def shrink_batch(self, current_iter: int) -> None:
        """Progressive learning: the stage's batch and patch size, cut at random from what was loaded."""
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

    # Validating.

    def test(self) -> None:
        """Restore `self.lq` into `self.output`, with the averaged weights where there are any."""
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
        images = track(share, f'validating {name}') if self.opt['val'].get('pbar', True) else share
        rows = []
        for index in images:
            data = dataset[index]
            rows.append(self.validate_image(data, name, current_iter, save_img))
            del self.lq, self.gt, self.output
        if self.opt['dist']:
            shares: list[Any] = [None] * self.opt['world_size']
            torch.distributed.all_gather_object(shares, rows)
            rows = [row for part in shares for row in part]
        # Time spent here is no training time.
        self.iteration_started += time.monotonic() - started
        if self.opt['rank'] == 0 and self.opt['val'].get('metrics'):
            self.report_validation(name, sorted(rows, key=lambda row: row['image']), current_iter, tb_logger)

    def validate_image(
        self, data: Mapping[str, Any], dataset: str, current_iter: Any, save_img: bool
    ) -> dict:
        """Restore one image, save it if asked; its metrics, restored and blurred, by name."""
        # LMDB keys and paths below a folder name an image; a base name alone need not be unique.
        image = os.path.splitext(os.path.basename(data['lq_path']))[0]
        self.feed_data({key: data[key][None] for key in ('lq', 'gt') if key in data})
        self.test()
        restored = tensor2img([self.output.detach().cpu()])
        if save_img:
            imwrite(restored, self.picture_path(dataset, image, current_iter))
        row: dict[str, Any] = {'image': image}
        if self.gt is not None:
            sharp, blurred = tensor2img([self.gt.cpu()]), tensor2img([self.lq.cpu()])
            for metric, settings in (self.opt['val'].get('metrics') or {}).items():
                row[metric] = float(calculate_metric({'img': restored, 'img2': sharp}, settings))
                row[f'{metric}_blurred'] = float(calculate_metric({'img': blurred, 'img2': sharp}, settings))
        return row

    def picture_path(self, dataset: str, image: str, current_iter: Any) -> str:
        folder = self.opt['path']['visualization']
        if self.opt['is_train']:
            return os.path.join(folder, image, f'{image}_{current_iter}.png')
        suffix = self.opt['val'].get('suffix') or self.opt['name']
        return os.path.join(folder, dataset, f'{image}_{suffix}.png')

    def report_validation(self, dataset: str, rows: list[dict], current_iter: Any, tb_logger: Any) -> None:
        """Log the means, remember the best ones, and write everything to `metrics_<dataset>.json`."""
        if not rows:
            raise UserError(f'the data set {dataset} has no images to validate on')
        metrics = list(self.opt['val']['metrics'])
        names = [name for metric in metrics for name in (metric, f'{metric}_blurred') if name in rows[0]]
        means = {name: float(np.mean([row[name] for row in rows])) for name in names}
        self.metric_results = {metric: means[metric] for metric in metrics if metric in means}
        self._initialize_best_metric_results(dataset)
        lines = [f'Validation {dataset}, {len(rows)} images']
        for metric, value in self.metric_results.items():
            self._update_best_metric_result(dataset, metric, value, current_iter)
            best = self.best_metric_results[dataset][metric]
            line = f'\t # {metric}: {value:.4f} (blurred: {means[f"{metric}_blurred"]:.4f})'
            if self.opt['is_train']:
                line += f'\tBest: {best["val"]:.4f} @ {best["iter"]} iter'
            lines.append(line)
            if tb_logger:
                tb_logger.add_scalar(f'metrics/{dataset}/{metric}', value, current_iter)
        get_root_logger().info('\n'.join(lines))
        record = {'dataset': dataset, 'iteration': current_iter, 'means': means, 'images': rows}
        write_json(record, os.path.join(self.opt['path']['log'], f'metrics_{dataset}.json'))

    # Saving and resuming.

    def save(self, epoch: int, current_iter: int) -> None:
        """Save the network, then the training state, each whole or not at all.

        The state comes last: what resumes from it finds the network that belongs to it.
        """
        started = time.monotonic()
        super().save(epoch, current_iter)
        self.save_record(current_iter)
        self.iteration_started += time.monotonic() - started

    @master_only
    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int | str,
        param_key: str | list[str] = 'params',
    ) -> None:
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content = {
            key: {name: tensor.cpu() for name, tensor in self.get_bare_model(network).state_dict().items()}
            for network, key in zip(nets, keys, strict=True)
        }
        label = 'latest' if current_iter == -1 else current_iter
        self.write(content, os.path.join(self.opt['path']['models'], f'{net_label}_{label}.pth'))

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        if current_iter == -1:
            return
        numpy_state: Any = np.random.get_state(legacy=True)
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'scaler': self.scaler.state_dict(),
            'seconds': self.trained_seconds,
            'rng': {
                'torch': torch.get_rng_state(),
                'random': random.getstate(),
                'numpy': (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
            },
        }
        self.write(state, os.path.join(self.opt['path']['training_states'], f'{current_iter}.state'))

    @staticmethod
    def write(content: Any, path: str) -> None:
        try:
            write_atomically(lambda temporary: torch.save(content, temporary), path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, 'strerror', None) or 'the disk may be full'
            raise UserError(
                f'cannot write {path}: {reason}; free some space and start with --auto_resume'
            ) from None

    @master_only
    def save_record(self, current_iter: int) -> None:
        """`training.json`: iterations done and seconds spent in them, validation and saving left out."""
        done = self.schedulers[0].last_epoch + 1 if current_iter == -1 else current_iter
        record = {'iterations': done, 'seconds': self.trained_seconds}
        write_json(record, os.path.join(self.opt['path']['experiments_root'], 'training.json'))

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on where a state was saved: optimisers, schedules, loss scale, random streams, time."""
        super().resume_training(resume_state)
        self.trained_seconds = resume_state.get('seconds', 0.0)
        if 'scaler' in resume_state:
            self.scaler.load_state_dict(resume_state['scaler'])
        streams = resume_state.get('rng')
        if streams and not self.opt['dist']:
            torch.set_rng_state(streams['torch'])
            random.setstate(_tuples(streams['random']))
            np.random.set_state(_tuples(streams['numpy']))


def write_json(content: Any, path: str) -> None:
    """Write JSON, whole or not at all."""

    def write(temporary: str) -> None:
        with open(temporary, 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=2)
            file.write('\n')

    write_atomically(write, path)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def _tuples(value: Any) -> Any:
    # `weights_only` gives lists back where a random state wants tuples.
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


@MODEL_REGISTRY.register()
class DSGformerModel(RestorationModel):
    """The former name of `RestorationModel`, which option files may have."""
