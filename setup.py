"""The package's metadata.  Pinned versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r"__version__ = '(.+)'", (here / 'dsgformer_arch' / '__init__.py').read_text(encoding='utf-8')
)

# `dsgformer serve`.  FastAPI and uvicorn come with Gradio, but are used directly too.
WEB = ['gradio>=6.31,<7', 'fastapi', 'uvicorn', 'python-multipart']

setup(
    name='dsgformer',
    version=version[1],
    description='Deep Sparse Gated Transformer for image deblurring, and its peers, as a plug-in of BasicSR',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['dsgformer_arch', 'dsgformer_arch.*']),
    package_data={
        'dsgformer_arch': [
            *('py.typed', 'ops/cpu/*.cpp', 'ops/cpu/*.h', 'benchmark/render/page.*'),
            *('weights/*.safetensors', 'weights/README.md'),
        ]
    },
    # Lower bounds only, so that an environment that works keeps its own torch.
    install_requires=[
        'torch>=2.6',
        'torchvision',
        'basicsr==1.4.2',
        'spandrel>=0.4.2',
        'spandrel_extra_arches>=0.2.0',
        'numpy',
        'scipy',
        'scikit-image',
        'opencv-python',
        'lmdb',
        'pyyaml',
        'pydantic>=2.7',
        'addict',
        'safetensors',
        'tqdm',
        'filelock',
        'requests',
        # What `dsgformer` reads and writes images with, and what tells it how much memory is free.
        'pillow',
        'pyvips[binary]',
        'tifffile',
        'psutil',
    ],
    extras_require={
        'benchmark': ['matplotlib'],
        'cluster': ['ray[data]'],
        'export': ['onnx', 'onnxscript', 'onnxruntime', 'openvino'],
        'hub': ['huggingface_hub'],
        'loader': ['pyvips[binary]'],
        'metrics': ['pyiqa'],
        'stream': ['litdata>=0.2.76'],
        'video': ['av'],
        'web': WEB,
        'fuzz': ['atheris'],
        'wandb': ['wandb'],
        'dev': [
            *('matplotlib', 'av', 'ray[data]', 'pytest', 'pytest-xdist', 'hypothesis', 'jsonschema'),
            *('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'huggingface_hub'),
            *('litdata', 'boto3', 'moto[s3]', 'flask', 'flask-cors'),  # moto and Flask: the tests' S3 server
            *(*WEB, 'playwright'),
            *('ruff', 'mypy', 'types-PyYAML', 'mkdocs-material', 'mkdocstrings[python]'),
            'triton; platform_system == "Linux"',  # its interpreter runs the GPU's kernels in the tests
        ],
    },
    entry_points={
        'console_scripts': [
            'basicsr=dsgformer_arch.cli.basicsr:main',
            'dsgformer=dsgformer_arch.cli.dsgformer:main',
        ]
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)  # fmt: skip
