from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically
from dsgformer_arch.zoo.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_into,
    mismatches,
    read_checkpoint,
)

STATE = {'body.weight': torch.arange(6.0).reshape(2, 3), 'body.bias': torch.tensor([1.0, -1.0])}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)


class RunsCode:
    """A pickle of it makes a file when it is read by a reader that trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_state(state: dict[str, Tensor]) -> None:
    assert list(state) == list(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize('wrapper', ['params', 'params_ema', 'state_dict', 'model', 'net', None])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_what_wraps_the_weights_is_taken_off(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in STATE.items()}
    content = {wrapper: state, 'epoch': 3} if wrapper else state
    assert_state(read_checkpoint(saved(tmp_path / 'net.pth', content)).state)


def test_averaged_weights_come_before_the_others(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    path = saved(tmp_path / 'net.pth', {'params': other, 'params_ema': STATE})
    assert_state(read_checkpoint(path).state)
    assert torch.equal(read_checkpoint(path, 'params').state['body.bias'], STATE['body.bias'] + 1)
    with pytest.raises(CheckpointError, match="no entry 'state_dict'; it has params, params_ema"):
        read_checkpoint(path, 'state_dict')


def test_numpy_scalars_and_other_data_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    content = {
        'state_dict': {**STATE, 'note': 'best', 'psnr': 33.7},
        'best_psnr': np.float64(33.72),
        'best_ssim': np.float32(0.966),
        'epoch': np.int64(12),
        'optimizer': {'state': {0: {'step': torch.tensor(3)}}, 'param_groups': [{'lr': 1e-4}]},
    }
    assert_state(read_checkpoint(saved(tmp_path / 'model_best.pth', content)).state)


def test_the_first_bytes_tell_the_form_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / 'net.pth'
    save_file(dict(STATE), path, {'system': 'dsgformer'})
    checkpoint = read_checkpoint(path)
    assert_state(dict(sorted(checkpoint.state.items(), reverse=True)))
    assert checkpoint.metadata == {'system': 'dsgformer'}


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / 'trace'
    path = tmp_path / 'evil.pth'
    torch.save({'params': STATE, 'extra': RunsCode(trace)}, path)
    with pytest.raises(CheckpointError, match='would run code'):
        read_checkpoint(path)
    assert not trace.exists()


def test_bare_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / 'trace'
    path = tmp_path / 'evil.pth'
    path.write_bytes(pickle.dumps(RunsCode(trace), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize('form', ['pth', 'safetensors'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / f'net.{form}'
    large = {'weight': torch.zeros(64, 64)}
    if form == 'pth':
        torch.save(large, path)
    else:
        save_file(large, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=str(path)):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is a folder'):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='there is no checkpoint'):
        read_checkpoint(tmp_path / 'absent.pth')
    for name, content in {'empty.pth': b'', 'text.pth': b'not a checkpoint', 'short.pth': b'PK'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert isinstance(caught.value, UserError)
        assert '\n' not in str(caught.value)
    for name, data in {'list.pth': [STATE], 'none.pth': {'epoch': 3}}.items():
        with pytest.raises(CheckpointError, match='weights of a network'):
            read_checkpoint(saved(tmp_path / name, data))


def test_a_checkpoint_written_to_memory_and_disk_reads_the_same(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / 'old_format.pth'
    path.write_bytes(buffer.getvalue())
    assert_state(read_checkpoint(path).state)


def test_mismatches_name_the_first_faults_and_count_the_rest() -> None:
    network = Network()
    assert mismatches(network, STATE) == []
    assert mismatches(network, {'body.weight': torch.zeros(2, 4), 'head': torch.zeros(1)}) == [
        'body.bias is missing',
        'head is not expected',
        'body.weight is 2×4, not 2×3',
    ]
    many = {f'extra{i}': torch.zeros(1) for i in range(5)} | STATE
    assert mismatches(network, many)[-1] == 'and 2 more'


def test_strict_refuses_and_otherwise_what_fits_is_loaded() -> None:
    network = Network()
    checkpoint = Checkpoint({'body.bias': STATE['body.bias'], 'head': torch.zeros(1)}, path='net.pth')
    before = network.body.weight.clone()
    with pytest.raises(CheckpointError, match=r'net.pth does not fit Network: body.weight is missing'):
        load_into(network, checkpoint)
    assert list(load_into(network, checkpoint, strict=False)) == [
        'body.weight is missing',
        'head is not expected',
    ]
    assert torch.equal(network.body.bias, STATE['body.bias'])
    assert torch.equal(network.body.weight, before)


def test_half_precision_weights_become_the_network_s_type() -> None:
    network = Network()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in STATE.items()}
    load_into(network, Checkpoint(half))
    assert network.body.weight.dtype == torch.float32
    assert torch.equal(network.body.weight, STATE['body.weight'])


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / 'net.pth'
    path.write_bytes(b'old')

    def fail(temporary: str) -> None:
        Path(temporary).write_bytes(b'half')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write_atomically(fail, path)
    assert [file.name for file in tmp_path.iterdir()] == ['net.pth']
    assert path.read_bytes() == b'old'
    write_atomically(lambda temporary: Path(temporary).write_bytes(b'new'), path)
    assert path.read_bytes() == b'new'
