"""`dsgformer doctor`: check the installation."""

from __future__ import annotations

import argparse

SUMMARY = 'check the installation; prints what a bug report needs'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer doctor`."""
    parser.description = (
        'Check versions, the fixes of BasicSR, the compiler, kernels and their self-tests, GPU and bfloat16. '
        'Exit status 1 where something is at fault.'
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 where one is a fault."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch.inference import doctor

    findings = doctor.examine()
    print(doctor.as_text(findings))
    return int(any(state == doctor.FAULT for _, state, _ in findings))
