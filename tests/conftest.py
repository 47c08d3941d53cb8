"""What every test needs: fixed imports, and one thread a process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton decides when it is imported whether kernels are interpreted, and what follows may import it.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

import dsgformer_arch  # noqa: F401  (fixes BasicSR before any test imports it)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_folder() -> Iterator[None]:
    """`basicsr --root` changes the working folder of its process; the next test starts where this one did."""
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _fresh_logger() -> Iterator[None]:
    """BasicSR keeps one logger a process, writing to the first run's file; each test gets its own."""
    yield
    from basicsr.utils.logger import initialized_logger

    logger = logging.getLogger('basicsr')
    for handler in logger.handlers[:]:
        handler.close()
        logger.removeHandler(handler)
    initialized_logger.clear()


@pytest.fixture
def vgg_weights(tmp_path: Path) -> Path:
    """A VGG-19 file of random weights: the real one takes a download."""
    from torchvision.models import vgg19

    torch.manual_seed(0)
    path = tmp_path / 'vgg19.pth'
    torch.save(vgg19(weights=None).features[:12].state_dict(), path)
    state = torch.load(path, weights_only=True)
    torch.save({f'features.{name}': tensor for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope='session')
def s3_server() -> Iterator[str]:
    """The address of an S3 server in this process."""
    server = pytest.importorskip('moto.server').ThreadedMotoServer(
        ip_address='127.0.0.1', port=0, verbose=False
    )
    server.start()
    logging.getLogger('werkzeug').setLevel(logging.WARNING)
    host, port = server.get_host_and_port()
    yield f'http://{host}:{port}'
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address `s3://<bucket>` of an empty bucket, with the environment that leads to it."""
    for name in ('AWS_PROFILE', 'AWS_SESSION_TOKEN', 'AWS_DEFAULT_PROFILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('AWS_ENDPOINT_URL', s3_server)
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'key')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'none'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'none'))
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    from dsgformer_arch.data import stream_files

    stream_files._client.cache_clear()
    stream_files._downloader.cache_clear()
    store = stream_files.client()
    for entry in store.list_buckets()['Buckets']:
        for item in store.list_objects_v2(Bucket=entry['Name']).get('Contents', ()):
            store.delete_object(Bucket=entry['Name'], Key=item['Key'])
        store.delete_bucket(Bucket=entry['Name'])
    store.create_bucket(Bucket='pairs')
    return 's3://pairs'


settings.register_profile('suite', max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile('long', max_examples=20_000, deadline=None, database=None)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'suite'))
