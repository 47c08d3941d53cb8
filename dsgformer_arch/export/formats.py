"""`export`, and the table of formats."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.export import darktable_file, onnx_file, openvino_files, program_file
from dsgformer_arch.export.image_to_image import ImageToImage, Interface, Precision
from dsgformer_arch.export.substitutes import variable_sizes
from dsgformer_arch.export.verify import Run, VerificationError, first_line, verify
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically


@dataclass(frozen=True)
class Format:
    """An export format."""

    title: str
    suffix: str
    """Suffix of its files"""
    exporters: Mapping[str, Callable[[ImageToImage, Interface, str], None]]
    """Functions that write a file, in the order in which they are tried"""
    runtime: Callable[[str], Run]
    """Loads a file in its runtime"""
    requires: tuple[str, ...] = ()
    """Packages that must be installed"""
    companions: tuple[str, ...] = ()
    """Suffixes of files that belong to it"""
    precisions: tuple[Precision, ...] = ('fp32', 'fp16')
    check: Callable[[], None] = lambda: None
    """Raises `UserError` where something other than a package is missing"""


FORMATS: dict[str, Format] = {
    'onnx': Format(
        'ONNX',
        '.onnx',
        onnx_file.EXPORTERS,
        onnx_file.runtime,
        requires=('onnx', 'onnxscript', 'onnxruntime'),
    ),
    'openvino': Format(
        'OpenVINO',
        '.xml',
        openvino_files.EXPORTERS,
        openvino_files.runtime,
        requires=('onnx', 'onnxscript', 'openvino'),
        companions=('.bin',),
    ),
    'torch': Format(
        'torch.export',
        '.pt2',
        program_file.EXPORTERS,
        program_file.runtime,
        precisions=('fp32',),
    ),
    'aoti': Format(
        'AOTInductor',
        '.pt2',
        program_file.AOT_EXPORTERS,
        program_file.aot_runtime,
        precisions=('fp32',),
        check=program_file.check_compiler,
    ),
    'darktable': Format(
        'darktable',
        '.dtmodel',
        darktable_file.EXPORTERS,
        darktable_file.runtime,
        requires=('onnx', 'onnxscript', 'onnxruntime'),
    ),
}
"""The formats by name.  Of several with one suffix, the first is the default for it."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path
    interface: Interface
    exporter: str
    """Which of the format's exporters made the file"""
    difference: float
    """Largest absolute difference from the reference implementation in float32"""


def check_target(
    path: str | os.PathLike[str], precision: Precision = 'fp32', format: str | None = None
) -> Format:
    """Choose the format of a file, and check that it can be written; called before slow work.

    Args:
        path: the file.
        precision: see `export`.
        format: one of `FORMATS`; None for the one with the suffix of `path`.

    Raises:
        UserError: no such format, or one with another suffix or without this precision; a package or a
            compiler is missing; or the folder does not exist or cannot be written.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f'there is no format {format!r}; choose {" or ".join(FORMATS)}')
    chosen = FORMATS if format is None else {format: FORMATS[format]}
    found = next((entry for entry in chosen.values() if entry.suffix == path.suffix.lower()), None)
    if found is None:
        suffixes = dict.fromkeys(entry.suffix for entry in chosen.values())
        raise UserError(f'{path}: choose a name that ends with {" or ".join(suffixes)}')
    if precision not in found.precisions:
        raise UserError(f'{path}: {found.title} is exported in {" or ".join(found.precisions)} only')
    for package in found.requires:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{found.title} needs the package {package}; run: pip install 'dsgformer[export]'"
            )
    found.check()
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f'{path}: there is no folder {folder}; create it first')
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'{path} cannot be written; choose another name with -o')
    return found


def export(
    network: RestorationNetwork,
    path: str | os.PathLike[str],
    system: str,
    precision: Precision = 'fp32',
    format: str | None = None,
) -> Exported:
    """Export a network to a file for another runtime, and verify it there.

    The file is run on images of two sizes that it was not exported with, and compared with the reference
    implementation (see `verify.TOLERANCES`).  If it fails, the next exporter of the format is tried.  `path`
    is written atomically, and only with a verified file.

    Args:
        network: in float32 on the CPU.
        path: the file to write; its suffix is the format's.
        system: name of the system, for the metadata.
        precision: type of the weights and of most of the arithmetic.
        format: one of `FORMATS`; None for the one with the suffix of `path`.

    Raises:
        UserError: as `check_target`; or `path` cannot be written.
        VerificationError: no exporter can make a file that computes what the network computes.
    """
    target = check_target(path, precision, format)
    interface = Interface.of(network, system, precision)
    module = ImageToImage(network, exported=True).eval()
    failures = []
    for exporter, write in target.exporters.items():
        try:
            return _attempt(module, network, Path(path), interface, target, exporter, write)
        except VerificationError as error:  # noqa: PERF203
            failures.append(str(error))
    raise VerificationError(f'{os.fspath(path)} was not written: {"; ".join(failures)}')


def _attempt(
    module: ImageToImage,
    network: RestorationNetwork,
    path: Path,
    interface: Interface,
    target: Format,
    exporter: str,
    write: Callable[[ImageToImage, Interface, str], None],
) -> Exported:
    """Export with one exporter, verify, and move the file to its path."""
    what = f'the file of the exporter {exporter}'
    try:
        with tempfile.TemporaryDirectory(prefix=f'.{path.name}.part', dir=path.absolute().parent) as folder:
            made = Path(folder) / path.name
            try:
                with variable_sizes():
                    write(module, interface, str(made))
            except OSError:
                raise
            except Exception as error:  # exporters raise classes of their own
                raise VerificationError(
                    f'the exporter {exporter} cannot express {interface.system} ({first_line(error)})'
                ) from error
            try:
                run = target.runtime(str(made))
            except Exception as error:  # runtimes raise classes of their own
                raise VerificationError(f'{what} does not load ({first_line(error)})') from error
            difference = verify(run, network, interface, what)
            for suffix in (*target.companions, path.suffix):
                moved = partial(os.replace, made.with_suffix(suffix))
                write_atomically(moved, path.with_suffix(suffix))
    except OSError as error:
        raise UserError(f'cannot write {path}: {error}') from None
    return Exported(path, interface, exporter, difference)
