"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str], typer.Option("-o", "--override", metavar="KEY=VALUE", help="A setting by its path; repeat for more.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
