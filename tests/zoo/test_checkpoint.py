from __future__ import annotations

import io
import os
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from safetensors.torch import save, save_file
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
from dsgformer_arch.zoo.pickles import NestedError, check_nesting, numbers_allowed

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
def test_wrapped_weights_are_unwrapped(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
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


def test_numpy_scalars_and_other_data_next_to_the_weights_are_ignored(tmp_path: Path) -> None:
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


def test_a_file_that_is_not_a_checkpoint_is_reported_in_one_sentence(tmp_path: Path) -> None:
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


# Damage and malice.


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """The archive with some records changed, by the last part of their names."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    target = path.with_name('changed.pth')
    with zipfile.ZipFile(target, 'w', compression) as archive:
        for name, content in records.items():
            archive.writestr(name, changed.get(name.rsplit('/', 1)[-1], content))
    return target


@pytest.mark.parametrize('bit', range(8))
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, bit: int) -> None:
    """`torch.load` reads such a file without a word (issue 15: 25.57 dB became 9.64 dB)."""
    path = saved(tmp_path / 'net.pth', {'params': {'weight': torch.full((1000,), 0.25)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((1,), 0.25).numpy().tobytes() * 4) + 803] ^= 1 << bit
    path.write_bytes(bytes(content))
    assert torch.load(path, weights_only=True)['params']['weight'].ne(0.25).sum() == 1
    with pytest.raises(CheckpointError, match=r'net.pth is damaged: the CRC-32 of net/data/0 differs'):
        read_checkpoint(path)


def test_archives_that_unpack_to_more_than_the_file_are_refused_unread(tmp_path: Path) -> None:
    path = saved(tmp_path / 'net.pth', {'weight': torch.zeros(2**22)})
    packed = rewritten(path, zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 2**16
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r'changed.pth is a compressed archive'):
        read_checkpoint(packed)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'net.pt'
    torch.jit.script(Network()).save(path)
    with pytest.raises(CheckpointError, match=r'net.pt is a TorchScript program; ask for a file of weights'):
        read_checkpoint(path)


UNUSABLE: dict[str, tuple[Tensor, str]] = {
    'nan': (torch.tensor([[1.0, float('nan')]]), 'body.weight holds infinite values or NaN'),
    'infinite': (torch.tensor([[1.0, -float('inf')]]).half(), 'body.weight holds infinite values or NaN'),
    'complex': (torch.zeros(2, 3, dtype=torch.complex64), 'body.weight is a complex tensor'),
    'sparse': (torch.eye(3).to_sparse(), 'body.weight is a sparse tensor'),
    'meta': (torch.zeros(2, 3, device='meta'), 'body.weight is a tensor without data'),
    'expanded': (torch.zeros(1).expand(2**40), 'body.weight is larger than what the file holds'),
    'quantised': (
        torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
        'body.weight is a quantised tensor',
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', UNUSABLE)
def test_tensors_other_than_weights_are_refused(tmp_path: Path, kind: str) -> None:
    tensor, told = UNUSABLE[kind]
    path = saved(tmp_path / 'net.pth', {'params': {'body.weight': tensor}})
    with pytest.raises(CheckpointError, match=f'net.pth: {told}'):
        read_checkpoint(path)


def test_tensors_that_share_memory_many_times_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(10_000)
    path = saved(tmp_path / 'net.pth', {f'weight{i}': weight for i in range(100)})
    with pytest.raises(CheckpointError, match='is larger than what the file holds'):
        read_checkpoint(path)
    assert len(read_checkpoint(saved(path, {'a': weight, 'b': weight})).state) == 2


def test_integers_in_the_place_of_weights_are_refused() -> None:
    state = {'body.weight': torch.zeros(2, 3, dtype=torch.int8), 'body.bias': STATE['body.bias']}
    with pytest.raises(CheckpointError, match=r'body.weight is of type int8, not float32'):
        load_into(Network(), Checkpoint(state, path='net.pth'))
    network = Network()
    before = network.body.weight.clone()
    load_into(network, Checkpoint(state), strict=False)
    assert torch.equal(network.body.weight, before)


@pytest.mark.parametrize('content', [{'params': STATE, 'params_ema': STATE}, STATE])
def test_a_wrong_key_is_an_error(tmp_path: Path, content: dict[str, Any]) -> None:
    told = 'params, params_ema' if 'params' in content else 'it is a state dict without such keys'
    with pytest.raises(CheckpointError, match=f"has no entry 'parms_ema'; .*{told}"):
        read_checkpoint(saved(tmp_path / 'net.pth', content), 'parms_ema')


def test_settings_of_the_network_travel_with_the_weights(tmp_path: Path) -> None:
    network = {'type': 'DSGformer', 'score': 'softmax', 'num_blocks': [1, 2, 4, 4]}
    checkpoint = read_checkpoint(saved(tmp_path / 'net.pth', {'params': STATE, 'network': network}))
    assert checkpoint.described() == ('DSGformer', {'score': 'softmax', 'num_blocks': [1, 2, 4, 4]})
    assert_state(checkpoint.state)
    # Some authors wrap their state dict in this key.
    assert read_checkpoint(saved(tmp_path / 'net.pth', {'network': STATE})).described() is None


@pytest.mark.parametrize('settings', ['[' * 100_000, '{"a":' * 100_000, '1' * 10_000, 'NaN', '', '[1]'])
def test_metadata_other_than_settings_are_reported_in_one_sentence(tmp_path: Path, settings: str) -> None:
    save_file(dict(STATE), tmp_path / 'net.safetensors', {'system': 'dsgformer', 'settings': settings})
    checkpoint = read_checkpoint(tmp_path / 'net.safetensors')
    with pytest.raises(CheckpointError, match='settings that are no JSON object'):
        checkpoint.described()


BASES = {'pth': io.BytesIO(), 'old': io.BytesIO(), 'safetensors': io.BytesIO(save(dict(STATE), {'a': 'b'}))}
torch.save({'params': STATE, 'epoch': np.float64(3)}, BASES['pth'])
torch.save({'params': STATE}, BASES['old'], _use_new_zipfile_serialization=False)


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    base=strategies.sampled_from(sorted(BASES)),
    edits=strategies.lists(
        strategies.tuples(strategies.floats(0, 1), strategies.binary(max_size=4)), max_size=4
    ),
    end=strategies.floats(0.5, 1),
)
@pytest.mark.filterwarnings('ignore')
def test_any_bytes_are_read_or_refused_in_one_sentence(
    tmp_path: Path, base: str, edits: list[tuple[float, bytes]], end: float
) -> None:
    content = bytearray(BASES[base].getvalue())
    for position, change in edits:
        start = int(position * len(content))
        content[start : start + len(change)] = change
    path = tmp_path / 'net.pth'
    path.write_bytes(bytes(content[: round(end * len(content))]) if end < 0.99 else bytes(content))
    told = ''
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        told = str(error)
    assert '\n' not in told
    assert str(path) in told or all(tensor.numel() < 100 for tensor in checkpoint.state.values())


def nested(levels: int) -> bytes:
    """A pickle of `{t: 1}` where t is a pair of references to a pair of references, and so on."""
    content = b'\x80\x02K\x01K\x01\x86q\x00'
    for level in range(1, levels):
        content += b'h%ch%c\x86q%c' % (level - 1, level - 1, level)
    return content + b'}h%cK\x01s.' % (levels - 1)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('levels', [18, 200])
def test_a_pickle_that_takes_hours_to_hash_is_refused(tmp_path: Path, legacy: bool, levels: int) -> None:
    """2^200 steps for 1 kB.  With 18 levels it takes a fraction of a second, where the check is missing."""
    path = tmp_path / 'net.pth'
    if legacy:
        head = [0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}]
        path.write_bytes(b''.join(pickle.dumps(part, 2) for part in head) + nested(levels))
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            for name, record in (('data.pkl', nested(levels)), ('version', b'3\n'), ('byteorder', b'little')):
                archive.writestr(f'net/{name}', record)
    with pytest.raises(NestedError):
        check_nesting(path)
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(path)


def test_what_pytorch_writes_is_not_nested(tmp_path: Path) -> None:
    content = {'params': STATE, 'betas': (0.9, 0.999), 'sizes': [(i, (i, i)) for i in range(30_000)]}
    for legacy in (False, True):
        torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=not legacy)
        check_nesting(tmp_path / 'net.pth')
        assert_state(read_checkpoint(tmp_path / 'net.pth').state)


@pytest.mark.parametrize(
    'state',
    [(3, '<', 20046, -1, -1, 0), (3, '>', None, None, None, -1, -1, 0), (), None, ('<',)],
    ids=['short', 'big-endian', 'empty', 'none', 'no order'],
)
def test_malformed_numpy_types_do_no_harm(state: tuple[Any, ...] | None, tmp_path: Path) -> None:
    """Found by fuzzing: NumPy ended the process with SIGSEGV at the first of these states."""
    path = tmp_path / 'net.pth'

    class Malformed:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, ('f8', False, True), state

    torch.save({'params': STATE, 'psnr': Malformed()}, path)
    if state is None or 20046 in state:  # pickle leaves the first out; the byte order of the other is sound
        assert_state(read_checkpoint(path).state)
        return
    with pytest.raises(CheckpointError, match='truncated, damaged or no checkpoint'):
        read_checkpoint(path)


def test_numpy_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    values = {kind.__name__: kind(1) for kind in kinds}
    torch.save(values, tmp_path / 'a.pth')
    with numbers_allowed():
        found = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert {key: type(value) for key, value in found.items()} == {k.__name__: k for k in kinds}
    assert found == values
    torch.save({'a': np.complex64(1)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / 'a.pth')


def test_names_of_weights_cannot_control_the_terminal(tmp_path: Path) -> None:
    torch.save({'\0\x1b[2J': torch.tensor([float('nan')])}, tmp_path / 'net.pth')
    with pytest.raises(CheckpointError, match=re.escape(r'net.pth: \x00\x1b[2J holds infinite values')):
        read_checkpoint(tmp_path / 'net.pth')
