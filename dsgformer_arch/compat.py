"""What BasicSR 1.4.2 needs on today's PyTorch, one function per fix.

BasicSR is used unchanged from its release of 2022.  Each function below fixes
one thing that has broken since, or that never worked on a machine without a
GPU, names the upstream report, and does nothing where upstream is sound.
`import dsgformer_arch` calls `apply()`; after that `import basicsr` works.

Nothing else in this package patches another library.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import random
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch

CONNECTING = timedelta(minutes=3)
"""How long the processes that torchrun started may take to connect over gloo."""


def load_registries() -> None:
    """Load `basicsr.utils.registry` without the rest of BasicSR, whose import takes seconds.

    A later `import basicsr` finds the module, and with it the same registries.
    """
    name = 'basicsr.utils.registry'
    package = importlib.util.find_spec('basicsr')
    if name in sys.modules or package is None or package.origin is None:
        return
    file = os.path.join(os.path.dirname(package.origin), 'utils', 'registry.py')
    spec: Any = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def fix_torchvision_operators() -> None:
    """Declare `torchvision::nms` and `qnms` where torchvision's library does not load.

    A CPU build of torch beside the ordinary (CUDA) torchvision wheel cannot
    load the wheel's compiled operators, and since torchvision 0.17 its import
    then stops with "operator torchvision::nms does not exist"
    (pytorch/vision#9085).  The declarations have no kernel: calling such an
    operator still fails, with torchvision's own explanation.
    """
    try:
        importlib.import_module('torchvision')
        return
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _keep_alive.append(library)
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]  # left half-initialised by the failed import
    importlib.import_module('torchvision')


_keep_alive: list[torch.library.Library] = []
"""A `Library` withdraws what it defined when it is collected."""


def fix_functional_tensor() -> None:
    """Provide `torchvision.transforms.functional_tensor`, removed in torchvision 0.17.

    BasicSR's `data/degradations.py` imports `rgb_to_grayscale` from it
    (XPixelGroup/BasicSR#663).
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    functional: Any = importlib.import_module('torchvision.transforms.functional')
    module = types.ModuleType(name, 'Replaces the module that torchvision 0.17 removed.')
    module.__dict__['rgb_to_grayscale'] = functional.rgb_to_grayscale
    sys.modules[name] = module


def fix_unsafe_yaml() -> None:
    """Read option files with YAML's safe loader.

    BasicSR builds its loader on `yaml.Loader`, for which a line such as
    `!!python/object/apply:os.system` is an instruction to run
    (yaml/pyyaml#420, CVE-2020-14343), and evaluates lists given to
    `--force_yml` as Python.
    """
    options: Any = importlib.import_module('basicsr.utils.options')
    yaml: Any = importlib.import_module('yaml')
    if not issubclass(options.ordered_yaml()[0], yaml.constructor.FullConstructor):
        return

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader, its mappings in the file's order."""

    class Dumper(yaml.SafeDumper):
        """Its counterpart; writes ordered mappings as plain ones."""

    Loader.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
        lambda loader, node: OrderedDict(loader.construct_pairs(node, deep=True)),
    )
    Dumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))
    upstream_value = options._postprocess_yml_value

    def forced_value(value: str) -> Any:
        return yaml.safe_load(value) if value.startswith('[') else upstream_value(value)

    options.ordered_yaml = lambda: (Loader, Dumper)
    options._postprocess_yml_value = forced_value


def init_gloo(**kwargs: Any) -> None:
    """Initialise the default process group over gloo.

    After a restart by torchrun on a busy machine, gloo was seen to wait for a connection that nobody opens.
    Its time limit for connecting is that of every operation, 30 minutes.  torchrun starts all processes at
    once, so there they get `CONNECTING`, and torchrun restarts a run that could not connect.

    Raises:
        UserError: the processes could not connect in time.
    """
    if not torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group(backend='gloo', **kwargs)
        return
    try:
        torch.distributed.init_process_group(backend='gloo', timeout=CONNECTING, **kwargs)
    except RuntimeError as error:
        # Importing the package applies all fixes, and this module is loaded without it to test each alone.
        from dsgformer_arch.utils.errors import UserError

        raise UserError(
            f'process {os.environ.get("RANK", "?")} could not connect to the others of this run within '
            f'{CONNECTING} over gloo; start it again ({error})'
        ) from None
    c10d: Any = torch.distributed.distributed_c10d
    c10d._set_pg_timeout(c10d.default_pg_timeout)  # of what they compute and wait for together


def fix_distributed_on_cpu() -> None:
    """Let distributed training start where there are no GPUs, over gloo.

    `init_dist` divides by the number of GPUs, always asks for nccl, and
    `model_to_device` names a CUDA device (the same lines in mmcv, from which
    BasicSR has them: open-mmlab/mmdetection#368).  Under SLURM it passes the
    list of nodes through a shell.
    """
    dist_util: Any = importlib.import_module('basicsr.utils.dist_util')
    if 'gloo' in inspect.getsource(dist_util._init_dist_pytorch):
        return
    base_model: Any = importlib.import_module('basicsr.models.base_model')
    upstream_to_device = base_model.BaseModel.model_to_device

    def init_pytorch(backend: str, **kwargs: Any) -> None:
        if torch.cuda.device_count():
            # torchrun numbers the processes of a machine in LOCAL_RANK; RANK is the global number.
            local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
            torch.distributed.init_process_group(backend=backend, **kwargs)
        else:
            init_gloo(**kwargs)

    def init_slurm(backend: str, port: int | None = None) -> None:
        first = subprocess.run(
            ['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']],
            capture_output=True, text=True, encoding='utf-8', check=True,
        ).stdout.split()[0]  # fmt: skip
        os.environ['MASTER_ADDR'] = first
        os.environ['MASTER_PORT'] = str(port or os.environ.get('MASTER_PORT', 29500))
        os.environ['RANK'] = os.environ['SLURM_PROCID']
        os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
        os.environ['LOCAL_RANK'] = os.environ.get('SLURM_LOCALID', os.environ['SLURM_PROCID'])
        init_pytorch(backend)

    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt['dist'] or self.device.type == 'cuda':
            return upstream_to_device(self, net)
        unused = self.opt.get('find_unused_parameters', False)
        return torch.nn.parallel.DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    dist_util._init_dist_pytorch, dist_util._init_dist_slurm = init_pytorch, init_slurm
    base_model.BaseModel.model_to_device = model_to_device


def fix_worker_seeding() -> None:
    """Seed data-loader workers from torch's seed, which differs from epoch to epoch.

    BasicSR seeds worker i with the same number each time an epoch starts, so
    that every epoch cuts and flips alike (the same slip as in
    pytorch/pytorch#5059).  torch's own seed in a worker is new at each epoch
    and still follows from `manual_seed`.
    """
    data: Any = importlib.import_module('basicsr.data')
    if 'initial_seed' not in inspect.getsource(data.worker_init_fn):
        data.worker_init_fn = worker_init_fn


def worker_init_fn(worker_id: int, num_workers: int, rank: int, seed: int) -> None:
    """Seed numpy and random in a worker; the signature is BasicSR's."""
    state = np.random.SeedSequence(torch.initial_seed() % 2**64).generate_state(2)
    np.random.seed(state[0])
    random.seed(int(state[1]))


def fix_dataset_epoch() -> None:
    """Tell a data set which epoch begins, where it has a method `set_epoch`.

    BasicSR tells its sampler only, so a data set with items that depend on seed, epoch and index would return
    the same items in every epoch.
    """
    sampler: Any = importlib.import_module('basicsr.data.data_sampler').EnlargedSampler
    upstream = sampler.set_epoch
    if upstream.__module__ == __name__:
        return

    def set_epoch(self: Any, epoch: int) -> None:
        upstream(self, epoch)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    sampler.set_epoch = set_epoch


def fix_unnamed_damaged_images() -> None:
    """Name the image where a pair cannot be read; see `data.paired_images`.

    BasicSR ends with `'NoneType' object has no attribute 'astype'`
    (XPixelGroup/BasicSR#254), and hides that the two images of a pair differ in size.
    """
    dataset: Any = importlib.import_module('basicsr.data.paired_image_dataset').PairedImageDataset
    if dataset.__getitem__.__name__ != get_pair.__name__:
        UPSTREAM[get_pair.__name__] = dataset.__getitem__
        dataset.__getitem__ = get_pair


UPSTREAM: dict[str, Any] = {}
"""BasicSR's own functions by the name of what replaces them, for tests that compare."""


def get_pair(dataset: Any, index: int) -> dict[str, Any]:
    """A pair of images; replaces `PairedImageDataset.__getitem__`."""
    from dsgformer_arch.data import paired_images

    return paired_images.get_pair(dataset, index)


FIXES: tuple[Callable[[], None], ...] = (
    fix_torchvision_operators,
    fix_functional_tensor,
    fix_unsafe_yaml,
    fix_distributed_on_cpu,
    fix_worker_seeding,
    fix_unnamed_damaged_images,
    fix_dataset_epoch,
)


def apply() -> None:
    """Apply every fix, in order; a second call changes nothing."""
    for fix in FIXES:
        fix()
