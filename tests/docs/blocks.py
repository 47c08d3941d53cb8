"""Code blocks of Markdown files, fenced or indented, and the commands of a shell block."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r'( *)(```+|~~~+) *([^\s`{]*)(.*)$')
CONTAINER = re.compile(r'(!!!|\?\?\?|=== |[-*+] |[0-9]+\. )')
"""Begins a paragraph whose indented lines are text: an admonition, a tab, an item of a list."""
SHELLS = ('sh', 'bash', 'shell', 'console')


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        file: the Markdown file's name.
        line: number of its first line of code.
        language: what the fence says; of an indented block `'python'` or `'sh'`, by its content.
        text: the code.
    """

    file: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f'{self.file}, line {self.line}'


def blocks_of(path: Path, name: str) -> list[Block]:
    """All code blocks of a Markdown file."""
    return list(_blocks(path.read_text(encoding='utf-8').splitlines(), name, 1))


def _blocks(lines: list[str], name: str, first: int) -> Iterator[Block]:
    at, before = 0, ''  # before: the last line of text
    while at < len(lines):
        line = lines[at]
        fence = FENCE.match(line)
        if fence:
            end = at + 1
            while end < len(lines) and lines[end].strip() != fence[2]:
                end += 1
            if end == len(lines):
                raise ValueError(f'{name}, line {first + at}: the fence is not closed')
            text = textwrap.dedent('\n'.join(lines[at + 1 : end]) + '\n')
            yield Block(name, first + at + 1, fence[3].lower(), text)
            at = end + 1
            continue
        if line.startswith('    ') and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith('    ') or not lines[end].strip()):
                end += 1
            inside = textwrap.dedent('\n'.join(lines[at:end])).rstrip() + '\n'
            if before.startswith(':::'):  # settings of mkdocstrings
                pass
            elif CONTAINER.match(before):
                yield from _blocks(inside.splitlines(), name, first + at)
            else:
                yield Block(name, first + at, 'python' if _is_python(inside) else 'sh', inside)
            at = end
            continue
        if line.strip() and not line.startswith(' '):
            before = line
        at += 1


def _is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(
        isinstance(node, (ast.Import, ast.ImportFrom, ast.Call, ast.Assign)) for node in ast.walk(tree)
    )


@dataclass
class Command:
    """A simple command of a shell block.

    Attributes:
        words: the program and its arguments, without assignments before it and redirections.
        stdin, stdout: files that it is redirected from and to.
    """

    words: list[str]
    stdin: str | None = None
    stdout: str | None = None
    text: str = field(default='', compare=False)


def commands_of(block: Block) -> list[Command]:
    """The simple commands of a shell block, pipelines and lists taken apart."""
    text = block.text
    if block.language == 'console' or text.startswith('$ '):
        text = ''.join(line[2:] + '\n' for line in text.splitlines() if line.startswith(('$ ', '> ')))
    text = re.sub(r'\\\n\s*', ' ', text)
    text = re.sub(
        r'\$\(\([^()]*\)\)|\$\([^()]*\)|\$SLURM_\w+', '1', text
    )  # what another command prints, a number of SLURM's
    found: list[Command] = []
    for line in _logical_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;<>')
        lexer.whitespace_split, lexer.commenters = True, '#'
        command, redirect = Command([], text=line.strip()), ''
        for word in [*lexer, ';']:
            if set(word) <= set('|&;'):
                while command.words and re.fullmatch(r'[A-Za-z_]\w*=.*', command.words[0], re.DOTALL):
                    del command.words[0]
                if command.words:
                    found.append(command)
                command, redirect = Command([], text=line.strip()), ''
            elif set(word) <= set('<>'):
                redirect = word
            elif redirect:
                if redirect == '<':
                    command.stdin = word
                else:
                    command.stdout = word
                redirect = ''
            else:
                command.words.append(word)
    return found


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, joined where a quotation goes on in the next one."""
    kept = ''
    for line in text.splitlines():
        kept = f'{kept}\n{line}' if kept else line
        try:
            shlex.split(kept, comments=True)
        except ValueError:
            continue
        yield kept
        kept = ''
    if kept:
        raise ValueError(f'a quotation is not closed: {kept}')
