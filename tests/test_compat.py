"""Each fix of BasicSR: the fault is there without it and gone with it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dsgformer_arch import compat
from tests.trees import ROOT

CHECKS = {
    'fix_unnamed_damaged_images': """
        import os, cv2, numpy
        from basicsr.data.paired_image_dataset import PairedImageDataset
        for side in ('gt', 'lq'):
            os.makedirs(side)
            cv2.imwrite(f'{side}/image.png', numpy.zeros((8, 8, 3)))
        with open('lq/image.png', 'wb') as file:
            file.write(b'cut off')
        pairs = PairedImageDataset({'dataroot_gt': 'gt', 'dataroot_lq': 'lq', 'io_backend': {'type': 'disk'},
                                    'phase': 'val', 'scale': 1})
        try:
            pairs[0]
        except Exception as error:
            assert 'lq/image.png' in str(error), error
        else:
            raise AssertionError('a damaged image was read')
    """,
    'fix_dataset_epoch': """
        import types
        from basicsr.data.data_sampler import EnlargedSampler
        told = []
        class Items(list):
            set_epoch = staticmethod(told.append)
        for items in (Items('abc'), [1, 2, 3]):
            sampler = EnlargedSampler(items, 1, 0)
            sampler.set_epoch(7)
            assert sampler.epoch == 7
        assert told == [7]
    """,
    'fix_torchvision_operators': 'import torchvision.transforms',
    'fix_functional_tensor': """
        import basicsr.data.degradations
        import torch
        grey = basicsr.data.degradations.rgb_to_grayscale(torch.ones(1, 3, 2, 2))
        assert grey.shape == (1, 1, 2, 2)
    """,
    'fix_unsafe_yaml': """
        import yaml
        from basicsr.utils.options import _postprocess_yml_value, ordered_yaml
        assert list(yaml.load('b: 1\\na: {d: 2, c: 3}', Loader=ordered_yaml()[0])['a']) == ['d', 'c']
        assert _postprocess_yml_value('[1, 2]') == [1, 2]
        assert _postprocess_yml_value('[__import__("os").getpid()]') != [__import__('os').getpid()]
        try:
            yaml.load('!!python/object/apply:os.getcwd []', Loader=ordered_yaml()[0])
        except yaml.constructor.ConstructorError:
            pass
        else:
            raise AssertionError('the option file ran code')
    """,
    'fix_distributed_on_cpu': """
        import os, socket, torch
        from basicsr.models.base_model import BaseModel
        from basicsr.utils.dist_util import init_dist
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1')
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        init_dist('pytorch')
        assert torch.distributed.get_backend() == 'gloo'
        model = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': True})
        net = model.model_to_device(torch.nn.Linear(2, 2))
        assert isinstance(net, torch.nn.parallel.DistributedDataParallel)
        torch.distributed.destroy_process_group()
    """,
    'fix_worker_seeding': """
        import random, numpy as np, torch
        from basicsr.data import build_dataloader

        class Draws(torch.utils.data.Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, index):
                return random.random() + np.random.random()

        def epochs(seed):
            torch.manual_seed(seed)
            opt = {'phase': 'train', 'batch_size_per_gpu': 2, 'num_worker_per_gpu': 1}
            loader = build_dataloader(Draws(), opt, num_gpu=0, seed=seed)
            return [next(iter(loader)).tolist() for _ in range(2)]

        first, second = epochs(7)
        assert first != second, 'both epochs drew the same'
        assert [first, second] == epochs(7), 'a seed does not fix the order'
    """,
}


def run(check: str, without: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `check` in a new process with every fix but `without`."""
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT)!r})
spec = importlib.util.spec_from_file_location('compat', {compat.__file__!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
if __name__ == '__main__':
    for fix in compat.FIXES:
        if fix.__name__ != {without!r}:
            fix()
"""
    program += textwrap.indent(textwrap.dedent(check), '    ')
    script = folder / 'script.py'
    script.write_text(program)
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_every_fix_has_a_check() -> None:
    assert set(CHECKS) == {fix.__name__ for fix in compat.FIXES}


@pytest.mark.parametrize('fix', CHECKS)
def test_fix_fixes_what_is_broken(fix: str, tmp_path: Path) -> None:
    if fix == 'fix_distributed_on_cpu' and torch.cuda.is_available():
        pytest.skip('upstream works on a machine with a GPU')
    (tmp_path / 'with').mkdir()
    fixed = run(CHECKS[fix], None, tmp_path / 'with')
    assert fixed.returncode == 0, fixed.stderr
    (tmp_path / 'without').mkdir()
    broken = run(CHECKS[fix], fix, tmp_path / 'without')
    if fix == 'fix_torchvision_operators' and broken.returncode == 0:
        pytest.skip("torchvision's operators load here")
    assert broken.returncode != 0, f'{fix} changes nothing here'


def test_fixes_do_nothing_twice_or_where_upstream_is_sound(tmp_path: Path) -> None:
    check = """
        import basicsr.data, basicsr.utils.options, basicsr.utils.dist_util as dist_util
        def fixed():
            return (basicsr.utils.options.ordered_yaml, dist_util._init_dist_pytorch,
                    basicsr.data.worker_init_fn, sys.modules['torchvision'])
        before = fixed()
        for fix in compat.FIXES:
            fix()
        assert fixed() == before
    """
    done = run(check, None, tmp_path)
    assert done.returncode == 0, done.stderr


def test_slurm_without_gpus_reads_its_variables(tmp_path: Path) -> None:
    check = """
        import os, socket, stat, torch
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        with open('scontrol', 'w') as file:
            file.write('#!/bin/sh\\necho 127.0.0.1\\necho other\\n')
        os.chmod('scontrol', stat.S_IRWXU)
        os.environ['PATH'] = os.getcwd() + os.pathsep + os.environ['PATH']
        os.environ.update(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_NODELIST='one')
        from basicsr.utils.dist_util import init_dist
        init_dist('slurm', port=port)
        assert torch.distributed.get_backend() == 'gloo'
        assert os.environ['MASTER_ADDR'] == '127.0.0.1'
        torch.distributed.destroy_process_group()
    """
    if torch.cuda.is_available():
        pytest.skip('this is the path of machines without a GPU')
    done = run(check, None, tmp_path)
    assert done.returncode == 0, done.stderr


def test_processes_of_torchrun_that_do_not_connect_end_soon(tmp_path: Path) -> None:
    """Gloo's own limit is 30 minutes, which stays that of every operation afterwards."""
    check = """
        import datetime, os, socket, torch
        from dsgformer_arch.utils.errors import UserError
        def start(world_size):
            with socket.socket() as probe:
                probe.bind(('127.0.0.1', 0))
                port = str(probe.getsockname()[1])
            os.environ.update(RANK='0', WORLD_SIZE=world_size, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            os.environ['TORCHELASTIC_RUN_ID'] = 'run'
            compat.init_gloo()
        start('1')
        gloo = torch.distributed.group.WORLD._get_backend(torch.device('cpu'))
        assert gloo.options._timeout == datetime.timedelta(minutes=30), gloo.options._timeout
        torch.distributed.destroy_process_group()
        compat.CONNECTING = datetime.timedelta(seconds=1)
        try:
            start('2')
        except UserError as error:
            assert 'process 0 could not connect to the others of this run within 0:00:01' in str(error)
        else:
            raise AssertionError('connected to nobody')
    """
    done = run(check, None, tmp_path)
    assert done.returncode == 0, done.stderr
