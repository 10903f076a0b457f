"""`asgo doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples

EXAMPLES = examples(
    "asgo doctor",
    "asgo doctor --json",
)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check this machine for training.

    Checks Python, torch, GPUs, compilers, packages, and the disk of the working directory. The table can go into bug
    reports: it contains no user name and no host name, and nothing is sent anywhere.
    """
    from dataclasses import asdict

    from pipelines.doctor import examine
    from pipelines.errors import AsgoError

    findings = list(examine(Path.cwd()))
    if as_json:
        console.show_json([asdict(finding) for finding in findings])
    else:
        console.show_facts(
            fact
            for finding in findings
            for fact in [(finding.what, finding.found), *([("", f"! {finding.warning}")] if finding.warning else [])]
        )
    broken = [finding.what for finding in findings if finding.broken]
    if broken:
        raise AsgoError(f"training cannot work here; fix first: {', '.join(broken)}")
    count = sum(bool(finding.warning) for finding in findings)
    console.say(f"{count} warning{'s' * (count > 1)}, marked with !" if count else "no problems found")
