"""The page of the command line, made of what ``--help`` says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from textwrap import dedent

import click

from srd_lab.cli.main import main

# a range whose upper end nobody comes near
_NEGLIGIBLE = re.compile(r"; \d+<=?x<=?\d{9,}(?:\.0)?(?=\])|\s*\[\d+<=?x<=?\d{9,}(?:\.0)?\]")


def page() -> str:
    """Markdown: a heading for each command, its usage and its options."""
    return "\n".join(
        line for command, context in _commands(main, None) for line in _section(command, context)
    )


def _commands(
    command: click.Command, parent: click.Context | None
) -> Iterator[tuple[click.Command, click.Context]]:
    context = click.Context(command, parent=parent, info_name="srd-lab" if parent is None else command.name)
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _commands(found, context)


def _section(command: click.Command, context: click.Context) -> Iterator[str]:
    yield from ("", f"## {context.command_path}", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield from ("```", *dedent("\n".join(paragraph.splitlines()[1:])).splitlines(), "```", "")
        else:
            yield from (_plain(" ".join(paragraph.split())), "")
    yield from (
        "```",
        " ".join(["srd-lab", *context.command_path.split()[1:], *command.collect_usage_pieces(context)]),
    )
    yield from ("```", "")
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record is None or "--help" in option.opts:
            continue
        names, text = record
        yield from (f"`{names}`", f": {_plain(_NEGLIGIBLE.sub('', text))}", "")


def _plain(text: str) -> str:
    """Text that is no Markdown: stars, brackets and dashes stay what they are, and code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if k % 2 else re.sub(r"[\\*_<>\[\]#$|]", r"\\\g<0>", part) for k, part in enumerate(parts)
    )
