"""`leakfast personas near`: a persona file with near misses of a source's prompt. Demands a persona; leaves the changes to
leakfast.prompts.near."""

from __future__ import annotations

import json
from pathlib import Path

import click

from leakfast.cli.places import FILE_OUT
from leakfast.cli.text import print_json, print_table
from leakfast.inert import inert


@click.command("near")
@click.option("--persona", required=True, help="The source whose near misses are made.")
@click.option(
    "--personas", "file", default="all", metavar="FILE", help="Persona set that it is of: all, or a file."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the words put in.")
@click.option("--out", required=True, type=FILE_OUT, help="Persona file to write, .toml.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there already.")
@click.option("--json", "as_json", is_flag=True, help="The personas with their distances as JSON on stdout.")
def near_(persona: str, file: str, seed: int, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write prompts at graded distance from a persona's: one word changed, half of it, clauses in another order, paraphrases;
    the persona itself is the first. The distance is in edits of a character, beside it the share of the longer text.

    Example: leakfast personas near --persona villain --out near.toml
    """
    from leakfast.errors import InputError
    from leakfast.prompts.near import near
    from leakfast.prompts.personas import load_personas
    from leakfast.stats.edits import levenshtein
    from leakfast.storage.disk import atomic_write

    if out.suffix != ".toml" or (out.exists() and not overwrite):
        why = "is there already" if out.suffix == ".toml" else "does not end in .toml, as a persona file does"
        raise InputError(
            f"personas: --out {out} {why}. Needed: a new file. Give another name, or --overwrite."
        )
    among = load_personas(file)
    (source,) = load_personas([persona], among=among)
    found = [source, *near(source, among, seed)]
    edits = levenshtein(source.prompt or "", [p.prompt or "" for p in found]).tolist()
    blocks = []
    for one, distance in zip(found, edits, strict=True):
        lines = ["[[persona]]", f"name = {json.dumps(one.name)}"]
        lines += [f"category = {json.dumps(one.category or 'source')}"]
        lines += [f"related_to = {json.dumps([persona] if one is not source else [])}"]
        lines += [f"prompt = {json.dumps(one.prompt, ensure_ascii=False)}  # {distance} edits"]
        blocks.append("\n".join(lines))
    text = f"# Near misses of {persona}, edits of a character from its prompt beside each.\n\n" + "\n\n".join(
        blocks
    )
    atomic_write(out, (text + "\n").encode())
    rows = [
        {
            "name": one.name,
            "change": one.category if one is not source else None,
            "edits": distance,
            "edits_share": distance / max(len(one.prompt or ""), len(source.prompt or "")),
            "prompt": one.prompt,
        }
        for one, distance in zip(found, edits, strict=True)
    ]
    if as_json:
        print_json(rows)
    else:
        shown = [[r["name"], r["edits"], round(r["edits_share"], 3), inert(r["prompt"])] for r in rows]
        print_table(["name", "edits", "share", "prompt"], shown, title=str(out))
