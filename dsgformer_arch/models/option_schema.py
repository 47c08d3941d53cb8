"""The options of a YAML file: their names, types and ranges, declared once as pydantic models.

`check_section` turns pydantic's errors into sentences.  `json_schema` exports the models as a JSON Schema for
editors; `python tools/make_option_schema.py` writes it to options/schema.json.

To add an option, add an attribute to the class of its section; editors show its docstring.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from dsgformer_arch.models.board import SAMPLES
from dsgformer_arch.utils.text import did_you_mean

NATURAL_MAX = 2**53
"""The largest whole number that every reader of JSON represents exactly."""

Natural = Annotated[int, Field(ge=0, le=NATURAL_MAX)]
Whole = Annotated[int, Field(ge=-NATURAL_MAX, le=NATURAL_MAX)]
Count = Annotated[int, Field(ge=1, le=NATURAL_MAX)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4000)]
Precision = Literal['bf16', 'fp16', False]


def _auto_or_count(value: Any) -> Any:
    if value == 'auto':
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError('gpu_count', 'auto or a whole number of at least 0')
    return value


GpuCount = Annotated[
    Natural,
    BeforeValidator(_auto_or_count),
    WithJsonSchema({'anyOf': [{'const': 'auto'}, {'type': 'integer', 'minimum': 0}]}),
]


class Section(BaseModel):
    """A section of an option file: no other keys, no conversion between types, numbers finite."""

    model_config = ConfigDict(
        strict=True,
        extra='forbid',
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class OpenSection(Section):
    """A section that takes any other key too."""

    model_config = ConfigDict(extra='allow')


class Top(Section):
    """The options outside all sections."""

    name: Annotated[
        str, StringConstraints(pattern=r'^[\w+-][\w.+-]*$', max_length=120), Field(title='folder name')
    ]
    """Names the folder below experiments/, results/ and tb_logger/."""
    model_type: Text
    """How the network is trained and measured: a name in BasicSR's MODEL_REGISTRY; RestorationModel."""
    scale: Count = 1
    """Output size over input size."""
    num_gpu: GpuCount
    """GPUs of this machine; auto counts them, 0 is the CPU."""
    manual_seed: Annotated[int, Field(ge=0, lt=2**32 - 2**16)] | None = None
    """Order, crops, flips and initial weights follow from it."""
    datasets: dict[str, Any]
    """The data sets: train and val, val_1, val_2 …; or test, test_1, test_2 …."""
    network_g: dict[str, Any]
    """The network: its type in ARCH_REGISTRY, and its settings."""
    path: dict[str, Any]
    """Checkpoints to start from."""
    train: dict[str, Any] | None = None
    """How to train."""
    val: dict[str, Any] | None = None
    """How to validate or test."""
    logger: dict[str, Any] | None = None
    """What to log and to save, and how often."""
    dist_params: dict[str, Any] | None = None
    """Settings of distributed training under SLURM."""
    save: dict[str, Any] | None = None
    """Which checkpoints to keep."""
    find_unused_parameters: bool = False
    """On several GPUs: whether some parameters get no gradient."""
    root: Text | None = None
    """Folder of experiments/, results/ and tb_logger/; relative to the option file."""


class DistParams(Section):
    backend: Literal['nccl', 'gloo'] = 'nccl'
    """How processes talk to each other."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the first process."""


class Path(Section):
    pretrain_network_g: Text | None = None
    """Checkpoint to start from, or to test."""
    param_key_g: Text | None = None
    """The checkpoint's entry that holds the weights: params_ema for averaged ones, params."""
    strict_load_g: bool = True
    """Refuse a checkpoint whose names or shapes differ."""
    resume_state: Text | None = None
    """Training state to resume from; --auto_resume finds the newest."""
    ignore_resume_networks: bool | None = None
    """Continue with the weights of pretrain_network_g instead of those of the state."""


class IoBackend(Section):
    type: Literal['lmdb', 'disk']
    """lmdb, or disk for folders of images."""


class Dataset(Section):
    name: Text
    """Names the data set in logs and result folders."""
    type: Text
    """A name in DATASET_REGISTRY: PairedCropDataset for training, PairedImageDataset for whole images."""
    dataroot_gt: Text | None = None
    """Sharp images: an LMDB `*.lmdb`, or a folder."""
    dataroot_lq: Text | None = None
    """Blurred images, with the same names."""
    io_backend: IoBackend | None = None
    """Where images are kept."""
    meta_info_file: Text | None = None
    """List of the images of a folder to use, one a line."""
    filename_tmpl: Annotated[str, StringConstraints(pattern=r'^[^{}]*\{\}[^{}]*$')] = '{}'
    """Name of a blurred image of a folder, with {} for its partner's name."""
    gt_size: Count | None = None
    """Side of the random crops."""
    pad_to_gt_size: bool = False
    """PairedCropDataset, StreamingPairedDataset: reflect images smaller than a crop at their right and lower
    border."""
    dataroot: Text | None = None
    """StreamingPairedDataset: a folder that tools/create_stream.py made, or s3://bucket/prefix."""
    cache_dir: Text | None = None
    """StreamingPairedDataset: folder for downloaded shards; ~ for ~/.cache/dsgformer/streams."""
    max_cache_size: Positive = 50
    """StreamingPairedDataset: most gigabytes (10^9 bytes) of downloaded shards in cache_dir."""
    shuffle_shards: Count = 32
    """StreamingPairedDataset: shards that training samples are drawn from at a time."""
    use_hflip: bool | None = None
    """Random horizontal flips."""
    use_rot: bool | None = None
    """Random vertical flips and 90° rotations."""
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """Subtracted from each channel."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None
    """Each channel is divided by it."""
    color: Literal['y'] | None = None
    """y for luminance only."""
    batch_size_per_gpu: Count | None = None
    """Crops in a step, for each GPU."""
    num_worker_per_gpu: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Processes that read crops; 0 reads in the training process."""
    dataset_enlarge_ratio: Count = 1
    """How often an epoch goes through the images."""
    prefetch_mode: Literal['cpu', 'cuda'] | None = None
    """~, or cpu or cuda for BasicSR's own reading ahead."""
    num_prefetch_queue: Count = 1
    """Batches that prefetch_mode cpu reads ahead."""
    pin_memory: bool = False
    """Faster copies to a GPU."""
    corrupt_images: Literal['fail', 'replace'] = 'fail'
    """What a damaged training image does: end the run, or be replaced by another image."""
    persistent_workers: bool = False
    """Keep the worker processes from epoch to epoch."""


METRIC_GIVEN = ('img', 'img2', 'better')
"""Arguments of metrics that no option file gives, and `better`, which BasicSR reads."""

DATASET_HOOKS = {'required': ('io_backend', 'dataroot_gt', 'dataroot_lq')}
"""Defaults of the attributes that a data set class may declare.

A class in DATASET_REGISTRY may have: `required`, the keys that it needs; `options`, keys that other data
sets do not know; and `check_options(section, where)`, which raises a `UserError`.
"""


class Optimizer(OpenSection):
    """`type` and `lr`; what else there is goes to the optimizer's class and is checked by it."""

    type: Text
    """An optimizer of torch.optim, such as AdamW."""
    lr: Positive
    """Peak of the schedule."""


class Scheduler(OpenSection):
    """`type`; what else there is goes to the scheduler's class and is checked by it."""

    type: Text
    """WarmupCosineLR, CosineAnnealingRestartCyclicLR, one of BasicSR's, or one of torch's by iteration."""


class Progressive(Section):
    iters: Annotated[list[Count], Field(min_length=1)]
    """Iterations of each stage."""
    batch_sizes: Annotated[list[Count], Field(min_length=1)]
    """Crops in a step, for each GPU."""
    gt_sizes: Annotated[list[Count], Field(min_length=1)]
    """Side of the crops."""


class Train(Section):
    total_iter: Count
    """Iterations of the whole run."""
    warmup_iter: int | None = None
    """BasicSR's linear warm-up; WarmupCosineLR has its own."""
    optim_g: Optimizer
    """The optimizer."""
    scheduler: Scheduler
    """The schedule of the learning rate."""
    grad_clip: Annotated[float, Field(ge=0)] | None = None
    """Max gradient norm; ~ for no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0
    """Decay of the averaged weights that validation and results use; 0 for none."""
    amp: Precision | None = None
    """bf16 or fp16 for autocast, ~ for float32."""
    channels_last: bool = False
    """Memory format of images and kernels."""
    compile: bool = False
    """torch.compile; the first iterations take minutes."""
    accumulate: Count = 1
    """Parts into which a batch is cut to save memory; the gradient is the whole batch's."""
    max_skipped_steps: Count | None = None
    """Steps in a row without a finite loss and gradient that end the run."""
    progressive: Progressive | None = None
    """Patch and batch size by stage."""


class Val(Section):
    val_freq: Count | None = None
    """Iterations between validations."""
    save_img: bool
    """Keep the restored images."""
    suffix: Text | None = None
    """Ends the names of restored images; ~ for the option file's name."""
    pbar: bool = True
    """A progress bar on a terminal, sparse lines in a log."""
    amp: Precision | None = None
    """bf16 or fp16 for autocast, ~ for float32."""
    tile: Count | None = None
    """Side of the tiles for images that do not fit in memory, ~ for whole images."""
    tile_overlap: Natural = 32
    """How far tiles overlap, in pixels."""
    metrics: dict[str, Any] | None = None
    """Metrics by the name that they have in the log."""


class Wandb(Section):
    project: Text | None = None
    """Project on Weights & Biases; ~ for none."""
    resume_id: Text | None = None
    """Run to continue."""


class Logger(Section):
    print_freq: Count
    """Iterations between two lines of the log."""
    save_checkpoint_freq: Count
    """Iterations between two checkpoints."""
    use_tb_logger: bool
    """TensorBoard events below tb_logger/."""
    samples: Natural = SAMPLES
    """Images of each validation set that are shown at each validation: blurred, restored, sharp."""
    wandb: Wandb | None = None
    """Weights & Biases, in addition to TensorBoard."""


class Save(Section):
    keep_last: Count | None = None
    """Newest checkpoints to keep; ~ keeps all."""
    best: Text | None = None
    """A name in val: metrics, by which the best network is kept as net_g_best.pth."""


# --- sections that name a registered class or function ------------------------------------------------------


@cache
def arguments_model(target: Callable[..., Any], given: tuple[str, ...] = ()) -> type[BaseModel]:
    """The section that a registered class or function is built from, by its signature.

    Args:
        target: the class or function.
        given: arguments that do not come from the option file.

    Returns:
        A model with `type` and the other arguments.  What has no annotation goes by its default; what has
        one that JSON cannot hold is not checked.  `extra` is 'allow' where it takes any keyword.
    """
    fields: dict[str, Any] = {'type': (Text, Field(description='Name in the registry.'))}
    open_ended = True
    for function in _constructors(target):
        hints = _hints(function)
        open_ended = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in ('self', *given):
                fields.setdefault(parameter.name, _field(parameter, hints.get(parameter.name)))
        if not open_ended:
            break
    base = OpenSection if open_ended else Section
    try:
        return create_model(target.__name__, __base__=base, **fields)
    except (PydanticUserError, NameError, TypeError):  # a name that pydantic keeps for itself
        return create_model(target.__name__, __base__=OpenSection, type=(Text, ...))


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The function; or of a class, each `__init__` that a keyword may reach through `**kwargs`."""
    if not inspect.isclass(target):
        return [target]
    return [kind.__dict__['__init__'] for kind in target.__mro__[:-1] if '__init__' in vars(kind)]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _field(parameter: inspect.Parameter, hint: Any) -> Any:
    default = ... if parameter.default is parameter.empty else parameter.default
    if hint is None or not _plain(hint):
        hint = UNTYPED.get(parameter.name) or _type_of(default)
    elif hint is int:
        hint = Whole
    if default is None:
        hint = hint | None
    # Defaults are not checked, and not all of them can be written to a schema.
    return (hint, ... if default is ... else Field(default_factory=lambda: default))


UNTYPED = {'crop_border': Natural, 'test_y_channel': bool, 'input_order': Literal['HWC', 'CHW']}
"""Arguments of BasicSR's metrics, which have neither annotation nor default."""


def _plain(hint: Any) -> bool:
    """Whether an option file can hold values of this type."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) or origin is Annotated:
        return all(map(_plain, inside[:1] if origin is Annotated else inside))
    if origin is Literal:
        return True
    if origin is not None:
        plain = origin in (list, tuple, dict) or getattr(origin, '__module__', '') == 'collections.abc'
        return plain and all(kind is Ellipsis or _plain(kind) for kind in inside)
    return hint in (bool, int, float, str, list, tuple, dict, type(None), Any)


def _type_of(default: Any) -> Any:
    if isinstance(default, bool):
        return bool
    if isinstance(default, (int, float)):
        return float
    if isinstance(default, str):
        return str
    return list[Any] if isinstance(default, (list, tuple)) else Any


# --- messages for faults ------------------------------------------------------------------------------------


def check_section(
    where: str,
    section: Any,
    model: type[BaseModel],
    required: Iterable[str] = (),
    also: Collection[str] = (),
) -> list[str]:
    """The faults of a section.

    Args:
        where: the section's place, such as `datasets: train`; empty for the file itself.
        section: its content.
        model: its model.
        required: keys that are required in addition to those of the model.
        also: keys that are known in addition to those of the model; their values are not checked.

    Returns:
        A sentence for each fault, in the order of the file.
    """
    if not isinstance(section, dict):
        return [f'{where} should be a section of its own, not {_shown(section)}']
    prefix = f'{where}: ' if where else ''
    faults = []
    if model.model_config.get('extra') == 'allow':
        # The class accepts any keyword: only likely misspellings are refused.
        faults = [
            f'{prefix}unknown key {key!r}{hint}'
            for key in section
            if key not in model.model_fields and (hint := did_you_mean(key, model.model_fields))
        ]
    values = {key: value for key, value in section.items() if key in model.model_fields or key not in also}
    missing = [key for key in required if key not in section]
    faults += [f'{prefix}{key} is ~, but has to be given' for key in required if section.get(key, 0) is None]
    try:
        # JSON knows lists only, so that a tuple may be given as one; types are as strict as in Python.
        model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        order = {key: number for number, key in enumerate(section)}
        found = sorted(error.errors(), key=lambda fault: order.get(str((*fault['loc'], '')[0]), len(order)))
        absent = [fault for fault in found if fault['type'] == 'missing' and len(fault['loc']) == 1]
        missing += [str(fault['loc'][0]) for fault in absent]
        faults += [
            _sentence(where, fault, model, also)
            for fault in _merged(found)
            if fault['type'] != 'missing' or len(fault['loc']) > 1
        ]
    return faults + [f'{prefix}the key {key!r} is missing' for key in dict.fromkeys(missing)]


def _merged(faults: list[Any]) -> list[Any]:
    """One fault for each value: a union reports one for each of its kinds."""
    merged: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        # The last part of these is always a key of the file.
        own = 1 if fault['type'] in ('extra_forbidden', 'missing') else 0
        inner, last = fault['loc'][: len(fault['loc']) - own], fault['loc'][len(fault['loc']) - own :]
        place = (*(part for part in inner if not _names_a_kind(part)), *last)
        merged.setdefault(place, {**fault, 'loc': place, 'all': []})['all'].append(fault)
    return list(merged.values())


def _names_a_kind(part: Any) -> bool:
    """Whether a part of a location is a member of a union, such as `list[int]`, and not a key of the file."""
    return isinstance(part, str) and (
        part in ('int', 'float', 'str', 'bool', 'none', 'function-before') or part[-1:] in (']', ')')
    )


def _sentence(where: str, fault: Any, model: type[BaseModel], also: Collection[str]) -> str:
    names = [part if isinstance(part, str) else f'entry {part + 1}' for part in fault['loc']]
    place = ': '.join([where, *names] if where else names)
    if fault['type'] == 'extra_forbidden':
        owner = _section_at(model, fault['loc'][:-1])
        known = {*owner.model_fields, *(also if len(names) == 1 else ())}
        place = ': '.join([where, *names[:-1]] if where else names[:-1])
        return f'{place}{": " if place else ""}unknown key {names[-1]!r}{did_you_mean(names[-1], known)}'
    if fault['type'] == 'missing':
        parent = place.rpartition(': ')[0]
        return f'{parent}: the key {names[-1]!r} is missing'
    wanted = ' or '.join(dict.fromkeys(filter(None, (_wanted(part) for part in fault['all']))))
    return f'{place} is {_shown(fault["input"])}, but should be {wanted}'


def _section_at(model: type[BaseModel], loc: Iterable[Any]) -> type[BaseModel]:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        kinds = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        model = next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), model)
    return model


WANTED = {
    'int_type': 'a whole number',
    'int_from_float': 'a whole number',
    'int_parsing_size': 'a whole number of less than 4300 digits',
    'float_type': 'a number',
    'finite_number': 'a finite number',
    'bool_type': 'true or false',
    'string_type': 'text',
    'list_type': 'a list',
    'tuple_type': 'a list',
    'dict_type': 'a section of its own',
    'model_type': 'a section of its own',
    'model_attributes_type': 'a section of its own',
    'is_instance_of': 'a list',
    'none_required': '~',
}


def _wanted(fault: Any) -> str:
    context = fault.get('ctx', {})
    match fault['type']:
        case 'greater_than_equal':
            return f'a number of at least {context["ge"]}'
        case 'greater_than':
            return f'a number above {context["gt"]}'
        case 'less_than_equal':
            return f'a number of at most {context["le"]}'
        case 'less_than':
            return f'a number below {context["lt"]}'
        case 'literal_error':
            return context['expected'].replace('"', "'").replace('False', 'false')
        case 'too_short' | 'too_long':
            least, most = context.get('min_length', 0), context.get('max_length')
            return f'a list of {"at least" if most is None else "at most"} {least if most is None else most}'
        case 'string_too_short':
            return 'some text'
        case 'string_too_long':
            return f'text of at most {context["max_length"]} characters'
        case 'string_pattern_mismatch':
            if '{' in context['pattern']:
                return 'text with {} in it, once'
            return 'the name of a folder: letters, digits, "_", "-", "+" and "."'
        case kind:
            return WANTED.get(kind, fault['msg'].removeprefix('Input should be ').lower())


def _shown(value: Any) -> str:
    text = '~' if value is None else repr(value)
    return text if len(text) <= 60 else f'{text[:57]}…'


# --- the schema for editors ---------------------------------------------------------------------------------


def schema_text() -> str:
    """The content of options/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + '\n'


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 7) of option files, with every registered network, loss, metric and data set."""
    from basicsr.utils import registry

    import dsgformer_arch  # noqa: F401  (fills the registries)

    sections_of = {
        'network': {name: arguments_model(target) for name, target in registry.ARCH_REGISTRY},
        'loss': {name: arguments_model(target) for name, target in registry.LOSS_REGISTRY},
        'metric': {name: arguments_model(target, METRIC_GIVEN) for name, target in registry.METRIC_REGISTRY},
    }
    own_keys = {name: getattr(target, 'options', ()) for name, target in registry.DATASET_REGISTRY}
    definitions: dict[str, Any] = {}

    def add(name: str, model: type[BaseModel]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template='#/$defs/{model}')
        definitions.update(schema.pop('$defs', {}))
        definitions[name] = _tidy(schema)
        return {'$ref': f'#/$defs/{name}'}

    top = _tidy(Top.model_json_schema())
    sections: dict[str, type[BaseModel]] = {
        'path': Path,
        'train': Train,
        'val': Val,
        'logger': Logger,
        'save': Save,
        'dist_params': DistParams,
    }
    for key, model in sections.items():
        top['properties'][key] = {
            'description': top['properties'][key]['description'],
            'anyOf': [add(model.__name__, model), {'type': 'null'}],
        }
    add('Dataset', Dataset)
    definitions |= {kind: _one_of(models) for kind, models in sections_of.items()}
    definitions['dataset'] = _dataset(definitions.pop('Dataset'), own_keys)
    top['properties']['network_g'] |= {'$ref': '#/$defs/network'}
    for key in ('additionalProperties', 'type'):
        top['properties']['network_g'].pop(key, None)
    top['properties']['datasets'] |= {
        'patternProperties': {r'^(train|(val|test)(_.*)?)$': {'$ref': '#/$defs/dataset'}},
        'additionalProperties': False,
    }
    definitions['Train']['patternProperties'] = {'_opt$': {'$ref': '#/$defs/loss'}}
    definitions['Val']['properties']['metrics'] = {
        'description': definitions['Val']['properties']['metrics']['description'],
        'type': ['object', 'null'],
        'additionalProperties': {'$ref': '#/$defs/metric'},
    }
    return {
        '$schema': 'http://json-schema.org/draft-07/schema#',
        'title': 'Options of basicsr train and basicsr test',
        **{key: value for key, value in top.items() if key != 'title'},
        '$defs': {name: _tidy(schema) for name, schema in sorted(definitions.items())},
    }


def _one_of(models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """`type` names one of the models, and the other keys are that one's."""
    return {
        'type': 'object',
        'required': ['type'],
        'properties': {'type': {'type': 'string', 'enum': sorted(models)}},
        'allOf': [
            {'if': {'properties': {'type': {'const': name}}, 'required': ['type']}, 'then': _own(name, model)}
            for name, model in sorted(models.items())
        ],
    }


def _own(name: str, model: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = _tidy(model.model_json_schema())
    except PydanticUserError:
        return {}
    schema['properties']['type'] = {'const': name}
    schema['additionalProperties'] = model.model_config.get('extra') == 'allow'
    return {key: schema[key] for key in ('properties', 'required', 'additionalProperties') if key in schema}


def _dataset(common: dict[str, Any], models: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """`Dataset` with the keys that some data sets add."""
    keys = {key for own in models.values() for key in own}
    properties = {**common['properties'], **{key: {} for key in sorted(keys)}}
    properties['type'] = {**properties['type'], 'enum': sorted(models)}
    return {**common, 'properties': properties}


def _tidy(schema: Any) -> Any:
    """Remove pydantic's titles, and bounds that validators read differently."""
    if isinstance(schema, list):
        return [_tidy(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: ({name: _tidy(entry) for name, entry in value.items()} if key in MAPS else _tidy(value))
        for key, value in schema.items()
        if not (key == 'title' and isinstance(value, str) and '$schema' not in schema)
        and not (key in ('maximum', 'minimum') and abs(value) == NATURAL_MAX)
    }


MAPS = ('properties', 'patternProperties', '$defs')
