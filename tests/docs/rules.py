"""How each command of the documentation is checked: one table, `RULES`.  A command without a rule fails.

To document a new command, nothing is needed where a rule fits already: every `dsgformer`, `basicsr` and
`tools/*.py` command is read by its own parser.  Add it to `RUN` to have it run on stand-ins (`SLOW` if that
takes more than a few seconds), or add a rule with its reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dsgformer_arch import zoo
from dsgformer_arch.cli import basicsr, dsgformer
from dsgformer_arch.inference import official_weights
from dsgformer_arch.models import options
from dsgformer_arch.utils import safe_yaml
from dsgformer_arch.utils.errors import UserError
from tests.docs import stand_ins
from tests.docs.blocks import Block, Command, commands_of
from tests.trees import ROOT, tiny_options

RUN = ('deblur', 'models', 'info', 'weights list', 'doctor')
"""Commands of `dsgformer` that are run on stand-ins; the others are read by their parser."""

SLOW = ('export',)
"""Commands of `dsgformer` that are run in the long test only."""

RUN_TOOLS = ('create_lmdb.py pairs', 'convert_checkpoint.py')
SLOW_TOOLS = ('synthesize_blur.py shake',)
"""Tools that are run on stand-ins, always and in the long test; of the others only the arguments are read."""

SMALLER = {
    '721, 1277': '41, 57',
    '720, 1280': '48, 64',
    '--count 500': '--count 2',
    '--count 8': '--count 2',
    '--crop 256': '--crop 32',
    '--crop 512': '--crop 32',
}
"""What stands in the documentation, and what is run instead, to take seconds."""

PAGE: dict[str, dict[str, Any]] = {}
"""By file: the names that its Python blocks share, from the top of the page to its end."""

NEEDS_SERVER = ('127.0.0.1', 'localhost', 'push_to_hub')
"""Python with one of these talks to a server: it is compiled, and its imports are done."""

SLOW_PYTHON = ('export(', 'onnxruntime')
"""Python with one of these is run in the long test; otherwise it is compiled and its imports are done."""

DATA_IS_MISSING = re.compile(
    r'(there is no|there is no file|cannot read the camera response) '
    r'(datasets|experiments|results|data|study)/'
)
"""Faults of option files that a reader with the data does not have."""


# Commands of this project.


def run_dsgformer(command: Command, slow: bool) -> None:
    words = shrunk(command.words[1:])
    parsed = dsgformer.parser().parse_args(words)
    name = ' '.join(words[:2]) if parsed.command == 'weights' else parsed.command
    model = getattr(parsed, 'model', None)
    if name == 'weights get' or (parsed.command == 'deblur' and model and '/' in model):
        for key in parsed.keys if name == 'weights get' else [model]:
            official_weights.find(key)  # downloading needs the network
        return
    if isinstance(model, str) and parsed.command in ('deblur', 'export') and not model.endswith('.pth'):
        zoo.get(model)
    on_a_cluster = any(word.startswith('/') for word in words)
    if on_a_cluster or (name not in RUN and not (slow and name in SLOW)):
        return
    for word in [*words[1:], command.stdin or '']:
        if re.search(r'[./]', word) and not word.startswith('-') and word != getattr(parsed, 'output', None):
            stand_ins.provide(word)
    if name == 'info' and words[1] == 'FILE':
        stand_ins.provide('photo.jpg')
        words[1] = 'photo.jpg'
    if parsed.command == 'deblur':
        words.append('--force')  # an earlier command may have made the same file
    with redirected(command):
        assert dsgformer.main(words) == 0


def check_basicsr(command: Command, slow: bool) -> None:
    words = command.words[command.words.index('basicsr') + 1 :]
    parsed = basicsr.parser().parse_args(words)
    if parsed.command == 'status':
        runs = {options.read(str(path)).get('name') for path in option_files()}
        assert Path(parsed.experiment).name in runs, f'no option file has the name {parsed.experiment}'
        return
    check_option_file(parsed.opt, tuple(parsed.force_yml), parsed.command == 'train')


@cache
def check_option_file(name: str, forced: tuple[str, ...], is_train: bool) -> None:
    settings = options.read(str(ROOT / name))
    options.force(settings, forced)
    check_options(settings, name, is_train)


def check_options(settings: dict[str, Any], name: str, is_train: bool, whole: bool = True) -> None:
    """Check options but for the data and W&B, which only the reader has; of a part, keys may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            options.check(settings, name, is_train)
        except UserError as error:
            lines = str(error).removeprefix(f'{name}: ').splitlines()
            faults = [line for line in lines if not re.match(r'.* has \d+ faults:$', line)]
            left = [fault for fault in faults if not DATA_IS_MISSING.search(fault)]
            # An optional package, which `make setup` does not install.
            left = [fault for fault in left if 'needs wandb: pip install' not in fault]
            left = [fault for fault in left if whole or not re.search(r"the key '\w+' is missing$", fault)]
            assert not left, '\n'.join(left)


def option_files() -> list[Path]:
    return sorted((ROOT / 'options').glob('*.yml'))


def run_tool(command: Command, slow: bool) -> None:
    words = command.words[command.words.index('python') + 1 :] if 'python' in command.words else command.words
    path, arguments = words[0], shrunk(words[1:])
    assert (ROOT / path).is_file(), f'there is no {path}'
    tool, name = load_tool(path), ' '.join([Path(path).name, *arguments])
    if name.startswith(RUN_TOOLS) or (slow and name.startswith(SLOW_TOOLS)):
        source = arguments[0] if 'convert' in path else arguments[1]
        stand_ins.provide(source, side=192)
        assert not tool.main(arguments)
        return
    only_parsed(lambda: tool.main(arguments))
    if 'benchmark' in path and '--models' in arguments:
        models = arguments[arguments.index('--models') + 1]
        for model in models.split(',') if models != 'all' else []:
            zoo.get(model)


@cache
def load_tool(path: str) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(f'tool_{Path(path).stem}', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Parsed(Exception):  # noqa: N818 (not an error)
    """The arguments were read."""


def only_parsed(main: Callable[[], Any]) -> None:
    """Run a command until it has read its arguments; wrong ones raise SystemExit."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: Any, *given: Any, **named: Any) -> Any:
        parse(self, *given, **named)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
        with pytest.raises(Parsed):
            main()


# Commands of other programs.


def check_torchrun(command: Command, slow: bool) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(command.words[1:])
    assert parsed.module, 'torchrun is documented with -m'
    check_module([parsed.training_script, *parsed.training_script_args], slow)


STARTED = ('basicsr', 'dsgformer', 'python', 'torchrun', 'ray')
"""What `srun` starts in the documentation."""


def check_srun(command: Command, slow: bool) -> None:
    at = [i for i, word in enumerate(command.words) if word in STARTED]
    assert at, f'srun starts none of {STARTED}'
    check_command(Command(command.words[at[0] :], text=command.text), slow)


def check_python_module(command: Command, slow: bool) -> None:
    check_module(command.words[2:], slow)


def check_module(words: list[str], slow: bool) -> None:
    cli = {'dsgformer_arch.cli.basicsr': 'basicsr', 'dsgformer_arch.cli.dsgformer': 'dsgformer'}
    if words[0] in cli:
        check_command(Command([cli[words[0]], *words[1:]]), slow)
    else:
        assert importlib.util.find_spec(words[0]), f'there is no module {words[0]}'


def run_python(command: Command, slow: bool) -> None:
    code = command.words[2]
    for name in re.findall(r"""['"]([\w./-]+)['"]""", code):
        if not name.startswith('out'):
            stand_ins.provide(name)
    exec(compile(code, '<python -c>', 'exec'), {})


def check_make(command: Command, slow: bool) -> None:
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text('utf-8'), re.MULTILINE))
    wanted = [word for word in command.words[1:] if '=' not in word]
    assert set(wanted) <= targets, f'the Makefile has no {set(wanted) - targets}'


def check_pip(command: Command, slow: bool) -> None:
    assert command.words[1] == 'install'
    setup = (ROOT / 'setup.py').read_text('utf-8')
    known = set(re.findall(r"^        '(\w+)': (?:\[|[A-Z])", setup, re.MULTILINE))
    for word in command.words[2:]:
        extras = re.fullmatch(r'(?:\.|dsgformer)\[([\w,]+)\]', word)
        if extras:
            assert set(extras[1].split(',')) <= known, f'setup.py has no extra of {word}'


def check_pytest(command: Command, slow: bool) -> None:
    for word in command.words[1:]:
        if word.startswith('tests'):
            path, *names = word.split('::')
            assert (ROOT / path).exists(), f'there is no {path}'
            assert all(f'def {name}' in (ROOT / path).read_text('utf-8') for name in names)


def syntax_only(command: Command, slow: bool) -> None:
    """`check_shell` has let bash read the block."""


@dataclass(frozen=True)
class Rule:
    """How commands are checked that begin with `pattern`, a regular expression."""

    pattern: str
    check: Callable[[Command, bool], None]
    reason: str


RULES = [
    Rule(r'dsgformer ', run_dsgformer, 'read by its parser; run on stand-ins where that takes seconds'),
    Rule(r'basicsr ', check_basicsr, 'training takes days: options, their file and --force_yml are checked'),
    Rule(r'(python |\./)?tools/\w+\.py', run_tool, "read by the tool's parser; cheap ones are run"),
    Rule(r'torchrun ', check_torchrun, 'needs several GPUs: its options and the command are checked'),
    Rule(r'srun ', check_srun, 'needs SLURM: the command that it starts is checked'),
    Rule(r'python -m ', check_python_module, 'checked as the command that the module is, or that it exists'),
    Rule(r'python -c ', run_python, 'run on stand-ins'),
    Rule(r'make ', check_make, 'takes minutes: the target exists'),
    Rule(r'pip ', check_pip, 'needs the network: the extras exist'),
    Rule(r'pytest ', check_pytest, 'run by the suite itself: files and tests exist'),
    Rule(r'(git|apt|apt-get|sudo|conda|docker|curl|wget|tensorboard|wandb|ray|aws|echo|export|sbatch|pnnx) ',
         syntax_only, 'another program, or the network: bash reads it'),
    Rule(r'(for|do|done|if|then|fi|while|mkdir|cp|mv|rm|ln|cd|ls|cat|unzip|tar|sleep)\b', syntax_only,
         "a step with the reader's own files: bash reads it"),
]  # fmt: skip


def check_command(command: Command, slow: bool) -> None:
    """Check a command by the first rule that fits."""
    text = ' '.join(command.words)
    if command.words[0] == 'do' and len(command.words) > 1:
        check_command(Command(command.words[1:], text=command.text), slow)
        return
    rule = next((rule for rule in RULES if re.match(rule.pattern, f'{text} ')), None)
    if rule is None:
        raise AssertionError(f'no rule of tests/docs/rules.py fits the command: {command.text or text}')
    rule.check(command, slow)


def shrunk(words: list[str]) -> list[str]:
    text = '\0'.join(words)
    for large, small in SMALLER.items():
        text = text.replace(large.replace(' ', '\0'), small.replace(' ', '\0'))
    return text.split('\0')


@contextlib.contextmanager
def redirected(command: Command) -> Iterator[None]:
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if command.stdin:
            patch.setattr(sys, 'stdin', io.TextIOWrapper(stack.enter_context(open(command.stdin, 'rb'))))
        if command.stdout:
            patch.setattr(sys, 'stdout', io.TextIOWrapper(stack.enter_context(open(command.stdout, 'wb'))))
        yield
        sys.stdout.flush()


# Blocks by language.


def check_shell(block: Block, slow: bool) -> None:
    text = block.text
    if block.language != 'console' and not text.startswith('$ '):
        read = subprocess.run(['bash', '-n'], input=text, capture_output=True, text=True, check=False)
        assert read.returncode == 0, read.stderr
    commands = commands_of(block)
    assert commands, 'no command in it'
    command = commands[0]
    try:
        for command in commands:
            check_command(command, slow)
    except SystemExit as error:
        raise AssertionError(f'status {error.code}: {command.text}') from error


def check_python(block: Block, slow: bool) -> None:
    text = block.text
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    tree, page = ast.parse(text), PAGE.setdefault(block.file, {})
    if page.get('compiled') or any(p in text for p in (NEEDS_SERVER if slow else NEEDS_SERVER + SLOW_PYTHON)):
        page['compiled'] = True  # what follows may need the names of this block
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    else:
        for name in re.findall(r"""\(['"]([\w./-]+\.\w+)['"]""", text):
            if 'write' not in text.partition(name)[0].splitlines()[-1]:
                stand_ins.provide(name)
    names = page.setdefault('names', {**stand_ins.names(), '__name__': 'block'})
    exec(compile(tree, block.where, 'exec'), names)


def check_yaml(block: Block, slow: bool) -> None:
    """A data set, a part of an option file, or the settings of another program, which YAML reads."""
    found = yaml.safe_load(block.text)
    changed = deepcopy(tiny_options())
    if isinstance(found, dict) and str(found.get('type', '')).endswith('Dataset'):
        changed['datasets']['train'] = safe_yaml.load(block.text)
    elif isinstance(found, dict) and set(found) & {'datasets', 'network_g', 'train', 'val', 'logger', 'save'}:
        for key, section in safe_yaml.load(block.text).items():
            if isinstance(section, dict) and 'type' not in section and isinstance(changed.get(key), dict):
                changed[key] |= section
            else:
                changed[key] = section
    else:
        return
    check_options(changed, block.where, is_train=True, whole=False)


def check_json(block: Block, slow: bool) -> None:
    for line in [block.text] if block.text.lstrip().startswith(('{\n', '[')) else block.text.splitlines():
        json.loads(line)


def check_nothing(block: Block, slow: bool) -> None:
    """What a program prints, or a form to fill in: nothing that could be run."""


LANGUAGES: dict[str, Callable[[Block, bool], None]] = {
    **dict.fromkeys(('sh', 'bash', 'shell', 'console'), check_shell),
    **dict.fromkeys(('python', 'py'), check_python),
    **dict.fromkeys(('yaml', 'yml'), check_yaml),
    'json': check_json,
    'text': check_nothing,
    'nginx': check_nothing,
}
"""By the language of a fence; an indented block is Python or a shell's.  Another one fails."""


def check_block(block: Block, slow: bool) -> None:
    """Check a block; `slow` runs what takes more than a few seconds too."""
    if block.language not in LANGUAGES:
        raise AssertionError(f'tests/docs/rules.py says nothing about blocks of {block.language!r}')
    LANGUAGES[block.language](block, slow)
