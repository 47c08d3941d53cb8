"""The table of systems: their settings, their sources, and the results in their papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Reported:
    """A result as a paper prints it.

    Attributes:
        dataset: test set.
        psnr: in dB.
        ssim: in 0..1; None if the source has none.
        table: the paper's table; empty if unknown.
        source: where the number was confirmed.
    """

    dataset: str
    psnr: float
    ssim: float | None
    table: str
    source: str


@dataclass(frozen=True)
class Weights:
    """A checkpoint in the package, for `zoo.create(name, pretrained=True)`.

    Attributes:
        file: its name in the package's folder `weights`.
        sha256: of the file, in hexadecimal digits; verified whenever it is loaded.
    """

    file: str
    sha256: str


@dataclass(frozen=True)
class System:
    """One system of the comparison.

    Attributes:
        name: as command lines and `zoo.create` take it.
        architecture: its class in ARCH_REGISTRY, a `RestorationNetwork`.
        settings: keyword arguments of that class.
        task: what the official weights are for, `'deblurring'` or `'deraining'`.
        title: of the paper; authors, venue and year with it.
        url: of the paper.
        release: repository of the official implementation.
        licence: of the official implementation.
        parameters: number of trainable parameters.
        giga_macs: 10⁹ MACs at 256×256, as `benchmark.measure.complexity` counts them, which takes seconds.
        reported: what its own paper reports.
        release_excess: MACs at 256×256 that the official implementation takes on top, for the same result.
        tlc: whether the test-time local converter applies to it.
        weights: the checkpoint in the package; None for none.
        compiles: `'yes'`, or what `torch.compile` cannot do and why.
        bf16: `'yes'`, or what bfloat16 autocast cannot do and why.
    """

    name: str
    architecture: str
    task: str
    title: str
    authors: str
    venue: str
    year: int
    url: str
    release: str
    licence: str
    parameters: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    reported: tuple[Reported, ...] = ()
    giga_macs: float | None = None
    release_excess: int = 0
    tlc: bool = False
    weights: Weights | None = None
    compiles: str = 'yes'
    bf16: str = 'yes'


RESTORER = 'quoted by PromptRestorer (NeurIPS 2023), tables 1 and 2'
RELEASE = "the official repository's README"
MLWNET = 'quoted by MLWNet (CVPR 2024), tables 1 and 4'
PAPERS_WITH_CODE = 'paperswithcode.com'
MHNET_FIGURES = (
    'tables shown in the official repository, fig/derain.png and fig/deblur.png, of an early version of '
    'the paper; for Rain100H, GOUB (ICML 2024) quotes 31.08 and 0.899 of a later one'
)
DRSFORMER_FIGURE = "table shown in the official repository's README, figs/table.png"


DSGFORMER = System(
    name='dsgformer',
    architecture='DSGformer',
    settings={'width': 48, 'num_blocks': (2, 6, 12, 12)},
    task='deblurring',
    title='Deep Sparse Gated Transformer for Image Deblurring',
    authors='Lu J.',
    venue='',
    year=2025,
    url='',
    release='this repository',
    licence="this repository's",
    parameters=15_567_983,
    giga_macs=55.5,
    tlc=True,
    reported=(Reported('GoPro', 33.72, 0.966, 'table 1', 'the paper'),),
)

MHNET = System(
    name='mhnet',
    architecture='MHNet',
    task='deblurring',
    title='Mixed Hierarchy Network for Image Restoration',
    authors='Gao H., Dang D.',
    venue='arXiv',
    year=2023,
    url='https://arxiv.org/abs/2302.09554',
    release='https://github.com/Tombs98/MHNet',
    licence='Academic Public Licence (non-commercial)',
    parameters=67_543_311,
    giga_macs=125.8,
    # Its attention multiplies four maps with V one by one, and two convolutions feed nothing.
    release_excess=327_155_712,
    tlc=True,
    reported=(
        Reported('GoPro', 33.19, None, '', MHNET_FIGURES),
        Reported('HIDE', 30.71, None, '', MHNET_FIGURES),
        Reported('Test100', 31.19, 0.903, 'table 1', MHNET_FIGURES),
        Reported('Test1200', 33.41, 0.924, 'table 1', MHNET_FIGURES),
        Reported('Rain100H', 30.34, 0.887, 'table 1', MHNET_FIGURES),
        Reported('Rain100L', 39.47, 0.984, 'table 1', MHNET_FIGURES),
    ),
)

MPRNET = System(
    name='mprnet',
    architecture='MPRNet',
    settings={'n_feat': 96, 'scale_unetfeats': 48, 'scale_orsnetfeats': 32},
    task='deblurring',
    title='Multi-Stage Progressive Image Restoration',
    authors='Zamir S. W., Arora A., Khan S., Hayat M., Khan F. S., Yang M.-H., Shao L.',
    venue='CVPR',
    year=2021,
    url='https://arxiv.org/abs/2102.02808',
    release='https://github.com/swz30/MPRNet',
    licence='Academic Public Licence (non-commercial)',
    parameters=20_127_073,
    giga_macs=759.4,
    tlc=True,
    reported=(
        Reported('GoPro', 32.66, 0.959, '', RESTORER),
        Reported('HIDE', 30.96, 0.939, '', RESTORER),
        Reported('RealBlur-R, trained on GoPro', 35.99, 0.952, '', RESTORER),
        Reported('RealBlur-J, trained on GoPro', 28.70, 0.873, '', RESTORER),
        Reported('RealBlur-R', 39.31, 0.972, '', MLWNET),
        Reported('RealBlur-J', 31.76, 0.922, '', MLWNET),
        Reported('Test100', 30.27, 0.897, '', RESTORER),
        Reported('Rain100H', 30.41, 0.890, '', RESTORER),
        Reported('Rain100L', 36.40, 0.965, '', RESTORER),
        Reported('Test2800', 33.64, 0.938, '', RESTORER),
        Reported('Test1200', 32.91, 0.916, '', RESTORER),
    ),
)

RESTORMER = System(
    name='restormer',
    architecture='Restormer',
    task='deblurring',
    title='Restormer: Efficient Transformer for High-Resolution Image Restoration',
    authors='Zamir S. W., Arora A., Khan S., Hayat M., Khan F. S., Yang M.-H.',
    venue='CVPR',
    year=2022,
    url='https://arxiv.org/abs/2111.09881',
    release='https://github.com/swz30/Restormer',
    licence='Academic Public Licence (non-commercial)',
    parameters=26_126_644,
    giga_macs=154.9,
    tlc=True,
    reported=(
        Reported('GoPro', 32.92, 0.961, 'table 2', RESTORER),
        Reported('HIDE', 31.22, 0.942, 'table 2', RESTORER),
        Reported('RealBlur-R, trained on GoPro', 36.19, 0.957, 'table 2', RESTORER),
        Reported('RealBlur-J, trained on GoPro', 28.96, 0.879, 'table 2', RESTORER),
        Reported('Test100', 32.00, 0.923, 'table 1', RESTORER),
        Reported('Rain100H', 31.46, 0.904, 'table 1', RESTORER),
        Reported('Rain100L', 38.99, 0.978, 'table 1', RESTORER),
        Reported('Test2800', 34.18, 0.944, 'table 1', RESTORER),
        Reported('Test1200', 33.19, 0.926, 'table 1', RESTORER),
    ),
)

STRIPFORMER = System(
    name='stripformer',
    architecture='Stripformer',
    task='deblurring',
    title='Stripformer: Strip Transformer for Fast Image Deblurring',
    authors='Tsai F.-J., Peng Y.-T., Lin Y.-Y., Tsai C.-C., Lin C.-W.',
    venue='ECCV',
    year=2022,
    url='https://arxiv.org/abs/2204.04627',
    release='https://github.com/pp00704831/Stripformer-ECCV-2022-',
    licence='MIT text restricted to non-commercial use',
    parameters=19_708_611,
    giga_macs=154.7,
    reported=(
        Reported('GoPro', 33.08, 0.962, '', PAPERS_WITH_CODE),
        Reported('HIDE', 31.03, 0.940, '', PAPERS_WITH_CODE),
        Reported('RealBlur-R', 39.84, 0.974, '', PAPERS_WITH_CODE),
        Reported('RealBlur-J', 32.48, 0.929, '', PAPERS_WITH_CODE),
    ),
)

CONVIR_L = System(
    name='convir_l',
    architecture='ConvIR',
    settings={'num_res': 16},
    task='deblurring',
    title='Revitalizing Convolutional Network for Image Restoration',
    authors='Cui Y., Ren W., Cao X., Knoll A.',
    venue='TPAMI',
    year=2024,
    url='https://ieeexplore.ieee.org/document/10571568',
    release='https://github.com/c-yn/ConvIR',
    licence='MIT',
    parameters=14_830_985,
    giga_macs=125.7,
    reported=(
        Reported('GoPro', 33.28, 0.963, '', RELEASE),
        Reported('RSBlur', 34.06, 0.868, '', RELEASE),
        Reported('Test100', 31.40, 0.919, '', RELEASE),
        Reported('Test2800', 33.73, 0.937, '', RELEASE),
    ),
)

MB_TAYLORFORMER_V2_L = System(
    name='mb_taylorformer_v2_l',
    architecture='MBTaylorFormerV2',
    settings={
        'dim': (24, 48, 72, 96),
        'num_blocks': (4, 6, 6, 8),
        'num_path': (2, 3, 3, 3),
        'offset_clamp': (-3, 3),
        'focusing_factor': 8,
    },
    task='deblurring',
    title='MB-TaylorFormer V2: Improved Multi-branch Linear Transformer Expanded by Taylor Formula '
    'for Image Restoration',
    authors='Jin Z., Qiu Y., Zhang K., Li H., Luo W.',
    venue='TPAMI',
    year=2025,
    url='https://arxiv.org/abs/2501.04486',
    release='https://github.com/FVL2020/MB-TaylorFormerV2',
    licence='none stated (its setup.py, inherited from BasicSR, names Apache 2.0)',
    parameters=7_295_528,
    giga_macs=86.2,
    # It computes the denominator of its attention, one number for each head, once for each channel.
    release_excess=7_025_197_056,
    reported=(Reported('GoPro', 33.24, 0.963, '', 'quoted by DSGformer (2025), table 1'),),
)

NAFNET64 = System(
    name='nafnet64',
    architecture='NAFNet',
    settings={'width': 64},
    task='deblurring',
    title='Simple Baselines for Image Restoration',
    authors='Chen L., Chu X., Zhang X., Sun J.',
    venue='ECCV',
    year=2022,
    url='https://arxiv.org/abs/2204.04676',
    release='https://github.com/megvii-research/NAFNet',
    licence='MIT',
    parameters=67_888_835,
    giga_macs=63.1,
    tlc=True,
    reported=(Reported('GoPro', 33.69, 0.967, 'table 7, with local pooling', 'the paper'),),
    compiles='inference whole; training with a break at each norm, whose gradient is written by hand',
)

DRSFORMER = System(
    name='drsformer',
    architecture='DRSformer',
    task='deraining',
    title='Learning A Sparse Transformer Network for Effective Image Deraining',
    authors='Chen X., Li H., Li M., Pan J.',
    venue='CVPR',
    year=2023,
    url='https://arxiv.org/abs/2303.11950',
    release='https://github.com/cschenxiang/DRSformer',
    licence='none stated (its setup.py, inherited from BasicSR, names Apache 2.0)',
    parameters=33_655_424,
    giga_macs=229.4,
    # It multiplies four maps with V one by one; here their weighted sum.
    release_excess=13_589_544_960,
    tlc=True,
    reported=(
        Reported('Rain200L', 41.23, 0.9894, 'table 1', DRSFORMER_FIGURE),
        Reported('Rain200H', 32.17, 0.9326, 'table 1', DRSFORMER_FIGURE),
        Reported('DID-Data', 35.35, 0.9646, 'table 1', DRSFORMER_FIGURE),
        Reported('DDN-Data', 34.35, 0.9588, 'table 1', DRSFORMER_FIGURE),
        Reported('SPA-Data', 48.54, 0.9924, 'table 1', DRSFORMER_FIGURE),
    ),
)

FFTFORMER = System(
    name='fftformer',
    architecture='FFTformer',
    task='deblurring',
    title='Efficient Frequency Domain-based Transformers for High-Quality Image Deblurring',
    authors='Kong L., Dong J., Ge J., Li M., Pan J.',
    venue='CVPR',
    year=2023,
    url='https://arxiv.org/abs/2211.12250',
    release='https://github.com/kkkls/FFTformer',
    licence='MIT',
    parameters=16_560_474,
    giga_macs=131.4,
    reported=(
        Reported('GoPro', 34.21, 0.969, '', PAPERS_WITH_CODE),
        Reported('HIDE', 31.62, None, '', 'wizwand.com'),
        Reported('RealBlur-R', 40.11, 0.973, '', MLWNET),
        Reported('RealBlur-J', 32.62, 0.933, '', MLWNET),
    ),
    bf16='autocast; its Fourier transforms stay in float32',
)

IPT = System(
    name='ipt',
    architecture='IPT',
    task='deraining',
    title='Pre-Trained Image Processing Transformer',
    authors='Chen H., Wang Y., Guo T., Xu C., Deng Y., Liu Z., Ma S., Xu C., Xu C., Gao W.',
    venue='CVPR',
    year=2021,
    url='https://arxiv.org/abs/2012.00364',
    release='https://github.com/huawei-noah/Pretrained-IPT',
    licence='Apache 2.0',
    parameters=115_312_707,
    giga_macs=13089.9,
    bf16='runs, but its values of 0 to 255 keep only 8 bits',
)

SYSTEMS: tuple[System, ...] = (
    DSGFORMER,
    replace(
        DSGFORMER,
        name='dsgformer_s',
        settings={'width': 16, 'num_blocks': (1, 2, 8, 20)},
        parameters=2_376_245,
        giga_macs=5.0,
        reported=(),
    ),
    replace(
        DSGFORMER,
        name='dsgformer_t',
        settings={'width': 16, 'num_blocks': (1, 2, 4, 4)},
        parameters=701_749,
        giga_macs=2.7,
        reported=(),
    ),
    replace(
        DSGFORMER,
        name='dsgformer_h',
        settings={
            'width': 16,
            'num_blocks': (1, 2, 4, 6),
            'patch': 2,
            'ratios': ('1/8', '1/4', '1/3', '1/2'),
            'output_init': 'zero',
        },
        parameters=889_478,
        giga_macs=0.8,
        reported=(),
        weights=Weights(
            'dsgformer_h.safetensors', '40209207dd5f543330e6a33368bed96a208c102d0ccb6a0f66a5af4332312938'
        ),
    ),
    MHNET,
    MPRNET,
    RESTORMER,
    STRIPFORMER,
    replace(
        CONVIR_L, name='convir_s', settings={'num_res': 4}, parameters=5_530_505, giga_macs=38.8, reported=()
    ),
    replace(
        CONVIR_L, name='convir_b', settings={'num_res': 8}, parameters=8_630_665, giga_macs=67.7, reported=()
    ),
    CONVIR_L,
    replace(
        MB_TAYLORFORMER_V2_L,
        name='mb_taylorformer_v2_b',
        settings={**MB_TAYLORFORMER_V2_L.settings, 'num_blocks': (2, 3, 3, 4), 'num_path': (2, 2, 2, 2)},
        parameters=2_629_436,
        giga_macs=38.1,
        release_excess=3_226_730_496,
        reported=(),
    ),
    MB_TAYLORFORMER_V2_L,
    replace(
        MB_TAYLORFORMER_V2_L,
        name='mb_taylorformer_v2_xl',
        settings={**MB_TAYLORFORMER_V2_L.settings, 'dim': (28, 56, 112, 160)},
        parameters=16_257_856,
        giga_macs=130.7,
        release_excess=10_076_815_360,
        reported=(),
    ),
    replace(
        NAFNET64,
        name='nafnet32',
        settings={'width': 32},
        parameters=17_111_907,
        giga_macs=16.0,
        reported=(Reported('GoPro', 32.85, 0.960, 'tables 2 and 3', 'the paper'),),
    ),
    NAFNET64,
    DRSFORMER,
    FFTFORMER,
    IPT,
)
"""All systems, in the order of the tables."""
