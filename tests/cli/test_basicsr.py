"""`basicsr train` and `basicsr test`, as a person runs them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from dsgformer_arch.cli import basicsr
from dsgformer_arch.utils.errors import UserError
from tests.trees import SHARED, tiny_options, write_project


@pytest.fixture(autouse=True)
def _restore_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes the folder and `sys.argv` of its process."""
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(sys, 'argv', ['basicsr'])


def options_to_test() -> dict[str, Any]:
    """Options that test what `tiny_options` trained."""
    options = tiny_options('tiny_test')
    dataset = options['datasets'].pop('val')
    options['datasets'] = {'test': dataset}
    options['path'] |= {
        'pretrain_network_g': 'experiments/tiny/models/net_g_latest.pth',
        'param_key_g': 'params_ema',
    }
    options['val'] |= {'save_img': True, 'suffix': None}
    for key in ('train', 'logger'):
        del options[key]
    return options


def test_train_then_test_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All output is below the project, from any working directory; the test reports what training reached."""
    file = write_project(tmp_path / 'project', tiny_options())
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    run = tmp_path / 'project' / 'experiments' / 'tiny'
    assert sorted(path.name for path in (run / 'models').iterdir()) == [
        'net_g_2.pth', 'net_g_4.pth', 'net_g_latest.pth',
    ]  # fmt: skip
    record = json.loads((run / 'training.json').read_text())
    assert record['iterations'] == 4
    assert record['seconds'] > 0
    trained = json.loads((run / 'metrics_sample.json').read_text())

    monkeypatch.chdir(elsewhere)
    file = write_project(tmp_path / 'project', options_to_test(), 'options/test.yml')
    assert basicsr.main(['test', '-opt', str(file)]) == 0
    results = tmp_path / 'project' / 'results' / 'tiny_test'
    tested = json.loads((results / 'metrics_sample.json').read_text())
    assert tested['means'] == pytest.approx(trained['means'])
    assert {row['image'] for row in tested['images']} == {'test-0', 'test-1'}
    images = sorted((results / 'visualization' / 'sample').iterdir())
    assert [image.name for image in images] == ['test-0_tiny_test.png', 'test-1_tiny_test.png']
    assert not list(elsewhere.iterdir())


def test_root_option_wins(tmp_path: Path) -> None:
    file = write_project(tmp_path / 'project', tiny_options(iterations=2))
    other = tmp_path / 'other'
    (other / 'datasets').mkdir(parents=True)
    (other / 'datasets' / 'sample').symlink_to(tmp_path / 'project' / 'datasets' / 'sample')
    assert basicsr.main(['train', '-opt', str(file), '--root', str(other)]) == 0
    assert (other / 'experiments' / 'tiny' / 'training.json').is_file()
    assert not (tmp_path / 'project' / 'experiments').exists()


def test_root_folder(tmp_path: Path) -> None:
    (tmp_path / 'results').mkdir()
    file = str(tmp_path / 'options' / 'a.yml')
    assert basicsr.root_folder(file, None) == str(tmp_path)
    assert basicsr.root_folder(str(tmp_path / 'a.yml'), None) == str(tmp_path)
    assert basicsr.root_folder(str(tmp_path / 'a.yml'), None, 'results') == str(tmp_path / 'results')
    with pytest.raises(UserError, match='does not exist'):
        basicsr.root_folder(file, str(tmp_path / 'nowhere'))


def test_interrupted_run_continues(tmp_path: Path) -> None:
    """Stopped after iteration 2 and resumed: same schedule, all steps counted, nothing done twice."""
    file = write_project(tmp_path, tiny_options(iterations=4))
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'train:total_iter=2']) == 0
    run = tmp_path / 'experiments' / 'tiny'
    before = torch.load(run / 'training_states' / '2.state', weights_only=True)
    weights = torch.load(run / 'models' / 'net_g_2.pth', weights_only=True)
    seconds = json.loads((run / 'training.json').read_text())['seconds']
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    after = torch.load(run / 'training_states' / '4.state', weights_only=True)
    assert [state['optimizers'][0]['state'][0]['step'].item() for state in (before, after)] == [2, 4]
    assert [state['schedulers'][0]['last_epoch'] for state in (before, after)] == [1, 3]
    assert after['optimizers'][0]['param_groups'][0]['lr'] == pytest.approx(1e-6)
    record = json.loads((run / 'training.json').read_text())
    assert record['iterations'] == 4
    assert record['seconds'] > seconds
    resumed = torch.load(run / 'models' / 'net_g_4.pth', weights_only=True)
    assert not torch.equal(resumed['params']['head.weight'], weights['params']['head.weight'])
    assert torch.allclose(resumed['params']['head.weight'], weights['params']['head.weight'], atol=0.01)


def content(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, optimizer and average included."""
    tensors: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[prefix] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(f'{prefix}/{key}', part)
        elif isinstance(value, (list, tuple)):
            for key, part in enumerate(value):
                collect(f'{prefix}/{key}', part)
        elif isinstance(value, (int, float)) and 'seconds' not in prefix:
            tensors[prefix] = torch.tensor(value)

    collect('network', torch.load(run / 'models' / f'net_g_{iteration}.pth', weights_only=True))
    collect('state', torch.load(run / 'training_states' / f'{iteration}.state', weights_only=True))
    return tensors


def assert_same_end(run: Path, other: Path, iteration: int) -> None:
    """Two runs ended bit for bit alike."""
    expected, found = content(run, iteration), content(other, iteration)
    assert set(expected) == set(found)
    differing = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert not differing
    for name in ('metrics_sample.json',):
        assert (run / name).read_text() == (other / name).read_text()


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(workers: int, tmp_path: Path) -> None:
    """Stopped within a pass over the data, with a validation right after the checkpoint."""
    options = tiny_options(iterations=7)
    options['datasets']['train'] |= {'num_worker_per_gpu': workers, 'persistent_workers': False}
    options['network_g']['recompute'] = True
    options['logger']['save_checkpoint_freq'] = 4
    options['val']['val_freq'] = 2
    file = write_project(tmp_path, options)
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'name=whole']) == 0
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'train:total_iter=4']) == 0
    basicsr_run = tmp_path / 'experiments' / 'tiny'
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    assert_same_end(tmp_path / 'experiments' / 'whole', basicsr_run, 7)
    assert not multiprocessing.active_children()
    best = torch.load(basicsr_run / 'training_states' / '7.state', weights_only=True)['best']
    assert set(best['sample']) == {'psnr', 'ssim'}


def test_a_second_run_of_one_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsgformer_arch.models import pipelines

    monkeypatch.setattr(pipelines, 'LOCK_SECONDS', 0.1)
    file = write_project(tmp_path, tiny_options(iterations=2))
    run = tmp_path / 'experiments' / 'tiny'
    with pipelines.run_lock({'rank': 0, 'path': {'experiments_root': str(run)}}):
        message = stopped(['train', '-opt', str(file)], capsys)
    assert 'another run called tiny' in message
    assert not run.exists()
    assert basicsr.main(['train', '-opt', str(file)]) == 0


def test_resume_state_with_a_new_name_and_another_root(tmp_path: Path) -> None:
    file = write_project(tmp_path, tiny_options(iterations=4))
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'train:total_iter=2']) == 0
    state = tmp_path / 'experiments' / 'tiny' / 'training_states' / '2.state'
    other = tmp_path / 'other'
    (other / 'datasets').mkdir(parents=True)
    (other / 'datasets' / 'sample').symlink_to(tmp_path / 'datasets' / 'sample')
    forced = [f'path:resume_state={state}', 'name=renamed']
    assert basicsr.main(['train', '-opt', str(file), '--root', str(other), '--force_yml', *forced]) == 0
    run = other / 'experiments' / 'renamed'
    assert (run / 'training_states' / '4.state').is_file()
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    assert_same_end(tmp_path / 'experiments' / 'tiny', run, 4)


def test_auto_resume_falls_back_from_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_project(tmp_path, tiny_options(iterations=4))
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    run = tmp_path / 'experiments' / 'tiny'
    shutil.copytree(run, tmp_path / 'whole')
    (run / 'models' / 'net_g_4.pth').write_bytes(b'damaged')
    leftover = run / 'models' / 'net_g_4.pth.part99'
    leftover.write_bytes(b'half')
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    error = capsys.readouterr().err
    assert error.count('skipping a checkpoint') == 1
    assert 'iterations 3 to 4' in error
    assert_same_end(tmp_path / 'whole', run, 4)
    assert not leftover.exists()


def test_an_earlier_run_is_kept_until_everything_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_options(iterations=2)
    file = write_project(tmp_path, options)
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    for forced in ('train:optim_g:type=Adamm', 'train:optim_g:momentum=0.9'):
        stopped(['train', '-opt', str(file), '--force_yml', forced], capsys)
    torch.save({'params': {'conv.weight': torch.ones(3, 3)}}, tmp_path / 'other.pth')
    forced = f'path:pretrain_network_g={tmp_path / "other.pth"}'
    assert 'does not fit' in stopped(['train', '-opt', str(file), '--force_yml', forced], capsys)
    assert [path.name for path in (tmp_path / 'experiments').glob('[!.]*')] == ['tiny']
    assert (tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth').is_file()


def test_kept_and_best_checkpoints(tmp_path: Path) -> None:
    options = tiny_options(iterations=8) | {'save': {'keep_last': 2, 'best': 'psnr'}}
    options['val']['val_freq'] = 1
    file = write_project(tmp_path, options)
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    run = tmp_path / 'experiments' / 'tiny'
    assert {path.name for path in (run / 'training_states').iterdir()} == {'6.state', '8.state'}
    assert {path.name for path in (run / 'models').iterdir()} == {
        'net_g_6.pth', 'net_g_8.pth', 'net_g_best.pth', 'net_g_latest.pth',
    }  # fmt: skip
    best = torch.load(run / 'training_states' / '8.state', weights_only=True)['best']['sample']['psnr']
    record = json.loads((run / 'metrics_sample.json').read_text())
    assert best['val'] >= record['means']['psnr'] or best['iter'] < 8
    saved = torch.load(run / 'models' / 'net_g_best.pth', weights_only=True)
    assert saved['network'] == options['network_g']


def make_corrupt(folder: Path, key: str) -> None:
    """The image is a PNG that ends after its signature."""
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), b'\x89PNG\r\n\x1a\n')


@pytest.mark.parametrize(('workers', 'prefetch'), [(0, None), (2, None), (0, 'cpu')])
def test_a_corrupt_image_ends_the_run_or_is_replaced(
    workers: int, prefetch: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_options(iterations=4)
    train = options['datasets']['train']
    train |= {'num_worker_per_gpu': workers, 'prefetch_mode': prefetch}
    file = write_project(tmp_path, options)
    make_corrupt(tmp_path / 'datasets' / 'sample' / 'train_lq.lmdb', 'train-1')
    message = stopped(['train', '-opt', str(file)], capsys)
    assert 'train-1' in message
    assert not multiprocessing.active_children()
    train['corrupt_images'] = 'replace'
    write_project(tmp_path, options)
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    error = capsys.readouterr().err
    assert error.count('other images take its place') == 1
    assert 'train-1' in error


@pytest.mark.parametrize(('weights', 'reason'), [
    (None, 'name the checkpoint that is to be tested'),
    (lambda value: value * float('nan'), 'NaN'),
    (lambda value: value.to(torch.int8), 'int8'),
    (lambda value: value * 1j, 'complex'),
])  # fmt: skip
def test_weights_that_cannot_be_tested(
    weights: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from basicsr.archs import build_network

    options = options_to_test()
    if weights is None:
        options['path']['pretrain_network_g'] = None
    else:
        path = tmp_path / options['path']['pretrain_network_g']
        path.parent.mkdir(parents=True)
        state = build_network(options['network_g']).state_dict()
        torch.save({'params_ema': {key: weights(value) for key, value in state.items()}}, path)
    file = write_project(tmp_path, options)
    assert reason in stopped(['test', '-opt', str(file)], capsys)
    assert not (tmp_path / 'results').exists()


def test_a_network_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in the shapes says which score a network was trained with."""
    assert basicsr.main(['train', '-opt', str(write_project(tmp_path, tiny_options(iterations=2)))]) == 0
    options = options_to_test()
    options['network_g'] |= {'score': 'softmax', 'recompute': True}
    file = write_project(tmp_path, options, 'options/test.yml')
    message = stopped(['test', '-opt', str(file)], capsys)
    assert 'was trained with score: relu2, but network_g: score is softmax' in message
    del options['network_g']['score']  # the default, which is what it was trained with
    write_project(tmp_path, options, 'options/test.yml')
    assert basicsr.main(['test', '-opt', str(file)]) == 0


def test_a_mistyped_param_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from basicsr.archs import build_network

    options = options_to_test()
    path = tmp_path / options['path']['pretrain_network_g']
    path.parent.mkdir(parents=True)
    torch.save({'params': build_network(options['network_g']).state_dict()}, path)
    file = write_project(tmp_path, options)
    message = stopped(['test', '-opt', str(file)], capsys)
    assert 'params_ema' in message


def test_a_full_disk_while_images_are_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr.archs import build_network

    from dsgformer_arch.utils import files

    options = options_to_test()
    path = tmp_path / options['path']['pretrain_network_g']
    path.parent.mkdir(parents=True)
    torch.save({'params_ema': build_network(options['network_g']).state_dict()}, path)
    file = write_project(tmp_path, options)

    def full(descriptor: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    assert 'No space left' in stopped(['test', '-opt', str(file)], capsys)
    assert not [path for path in (tmp_path / 'results').rglob('*') if '.png' in path.name]


def test_a_forced_seed_seeds(tmp_path: Path) -> None:
    file = write_project(tmp_path, tiny_options(iterations=2))
    for name, seed in (('a', 1), ('b', 2), ('c', 1)):
        forced = [f'name={name}', f'manual_seed={seed}']
        assert basicsr.main(['train', '-opt', str(file), '--force_yml', *forced]) == 0
    weights = [
        torch.load(tmp_path / 'experiments' / name / 'models' / 'net_g_2.pth', weights_only=True)['params']
        for name in 'abc'
    ]
    assert not torch.equal(weights[0]['head.weight'], weights[1]['head.weight'])
    assert torch.equal(weights[0]['head.weight'], weights[2]['head.weight'])


@pytest.mark.parametrize(('images', 'batch', 'total'), [(3, 2, 7), (3, 8, 2)])
def test_a_run_does_exactly_total_iter_iterations(
    images: int, batch: int, total: int, tmp_path: Path
) -> None:
    """Where the batch does not divide the data set, and where it is larger than the data set."""
    options = tiny_options(iterations=total)
    options['datasets']['train'] |= {'batch_size_per_gpu': batch, 'dataset_enlarge_ratio': 1}
    options['train']['optim_g'] |= {'type': 'SGD', 'lr': 0.1}
    for key in ('betas', 'weight_decay'):
        del options['train']['optim_g'][key]
    options['logger']['save_checkpoint_freq'] = 1000
    del options['val'], options['datasets']['val']
    file = write_project(tmp_path, options)
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    run = tmp_path / 'experiments' / 'tiny'
    assert [path.name for path in (run / 'training_states').iterdir()] == [f'{total}.state']
    state = torch.load(run / 'training_states' / f'{total}.state', weights_only=True)
    assert state['position'] == total * batch
    assert state['schedulers'][0]['last_epoch'] == total - 1
    assert json.loads((run / 'training.json').read_text())['iterations'] == total


@pytest.mark.long
def test_terminated_run_saves_its_state(tmp_path: Path) -> None:
    options = tiny_options(iterations=100000)
    options['logger']['save_checkpoint_freq'] = 100000
    options['val']['val_freq'] = 100000
    file = write_project(tmp_path, options)
    process = subprocess.Popen(
        [sys.executable, '-m', 'dsgformer_arch.cli.basicsr', 'train', '-opt', str(file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if 'iter:       3' in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert 'resume with --auto_resume' in rest
    states = list((tmp_path / 'experiments' / 'tiny' / 'training_states').iterdir())
    assert len(states) == 1
    assert (tmp_path / 'experiments' / 'tiny' / 'models' / f'net_g_{states[0].stem}.pth').is_file()


@pytest.mark.long
def test_two_processes_train_together(tmp_path: Path) -> None:
    """torchrun on a machine without GPUs, and a validation that both share."""
    if torch.cuda.is_available():
        pytest.skip('this is the path of machines without a GPU')
    file = write_project(tmp_path, tiny_options(iterations=2))
    done = subprocess.run(
        [
            sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
            '-m', 'dsgformer_arch.cli.basicsr', 'train', '-opt', str(file), '--launcher', 'pytorch',
        ],
        capture_output=True, text=True, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / 'experiments' / 'tiny' / 'metrics_sample.json').read_text())
    assert len(record['images']) == 2


def stopped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        basicsr.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    lines = [line for line in error.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    return lines[0]


def test_wrong_input_is_reported_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'no/such.yml' in stopped(['train', '-opt', 'no/such.yml'], capsys)
    options = tiny_options()
    options['network_g']['type'] = 'DSGFormr'
    file = write_project(tmp_path, options)
    assert 'did you mean DSGformer' in stopped(['train', '-opt', str(file)], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['datasets', 'options']


def test_checkpoint_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_to_test()
    weights = tmp_path / options['path']['pretrain_network_g']
    weights.parent.mkdir(parents=True)
    torch.save({'params_ema': {'conv.weight': torch.ones(3, 3)}}, weights)
    file = write_project(tmp_path, options)
    message = stopped(['test', '-opt', str(file)], capsys)
    assert 'net_g_latest.pth does not fit DSGformer' in message
    assert 'head.weight is missing' in message


def test_checkpoint_that_would_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / 'made'),)

    options = options_to_test()
    weights = tmp_path / options['path']['pretrain_network_g']
    weights.parent.mkdir(parents=True)
    torch.save({'params_ema': Evil()}, weights)
    file = write_project(tmp_path, options)
    assert 'would run code' in stopped(['test', '-opt', str(file)], capsys)
    assert not (tmp_path / 'made').exists()


def test_missing_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    options = tiny_options() | {'num_gpu': 1}
    file = write_project(tmp_path, options)
    assert 'has no GPU' in stopped(['train', '-opt', str(file)], capsys)


def test_full_disk_is_reported_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(content: Any, path: str) -> None:
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    file = write_project(tmp_path, tiny_options())
    monkeypatch.setattr(torch, 'save', full)
    message = stopped(['train', '-opt', str(file)], capsys)
    assert 'No space left' in message
    assert 'net_g_2.pth' in message
    assert not list((tmp_path / 'experiments' / 'tiny' / 'models').iterdir())


def test_gopro_pair_reports_its_known_psnr(tmp_path: Path) -> None:
    """A real pair in GoPro's layout, through the preset and `basicsr test`: 24.05 dB blurred."""
    pair = SHARED / 'data' / 'gopro_pair'
    if not pair.is_dir():
        pytest.skip(f'the real GoPro pair is not at {pair}')
    from basicsr.archs import build_network

    for kind in ('blur', 'sharp'):
        folder = tmp_path / 'GOPRO_Large' / 'test' / 'GOPR0384_11_00' / kind
        folder.mkdir(parents=True)
        (folder / '000001.png').write_bytes((pair / kind / 'istanbul.png').read_bytes())
    subprocess.run(
        [
            sys.executable, str(Path(__file__).parents[2] / 'tools' / 'create_lmdb.py'), 'gopro',
            str(tmp_path / 'GOPRO_Large'), str(tmp_path / 'datasets' / 'gopro'), '--split', 'test',
        ],
        check=True,
    )  # fmt: skip
    options = options_to_test()
    for key in ('gt', 'lq'):
        options['datasets']['test'][f'dataroot_{key}'] = f'datasets/gopro/test_{key}.lmdb'
    options['val']['save_img'] = False
    weights = tmp_path / options['path']['pretrain_network_g']
    weights.parent.mkdir(parents=True)
    torch.save({'params_ema': build_network(options['network_g']).state_dict()}, weights)
    file = write_project(tmp_path, options)
    assert basicsr.main(['test', '-opt', str(file)]) == 0
    means = json.loads((tmp_path / 'results' / 'tiny_test' / 'metrics_sample.json').read_text())['means']
    assert np.isclose(means['psnr_blurred'], 24.05, atol=0.005)


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        basicsr.main(['--help'])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert 'basicsr train -opt' in text
    assert 'root' in text
