"""`leakfast doctor`: the environment and the chosen paths, for people or as JSON.
Leaves finding them to leakfast.doctor."""

from __future__ import annotations

import click

from leakfast.cli.text import print_json, print_table
from leakfast.errors import LeakfastError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def cli(as_json: bool) -> None:
    """Show the environment, the chosen fast paths and why; exit 1 if something needed is missing.

    Example: leakfast doctor --json
    """
    from leakfast.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise LeakfastError("\n       ".join(found["problems"]))


def _print(found: dict) -> None:
    cpu, memory = found["cpu"], found["memory_bytes"]
    click.echo(f"leakfast {found['leakfast']} in {found['installed_at']}")
    click.echo(f"Python {found['python']} on {found['platform']}")
    click.echo(f"{cpu['model']}, {cpu['cores_usable']} cores usable, {cpu['torch_threads']} torch threads")
    click.echo(f"memory {memory / 2**30:.1f} GiB" if memory else "memory unknown")
    for gpu in found["gpus"]:
        click.echo(
            f"GPU {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, capability {gpu['capability']}"
        )
    if not found["gpus"]:
        click.echo("no GPU")
    click.echo()
    print_table(["job", "path", "why"], [(p["what"], p["chosen"], p["why"]) for p in found["paths"]])
    click.echo()
    print_table(
        ["package", "version", "for"],
        [
            (p["name"], p["version"] or ("MISSING" if p["required"] else "absent"), p["use"])
            for p in found["packages"]
        ],
    )
    click.echo()
    organism = found["organism"]
    click.echo(f"organism: {organism['fingerprint'] if organism['present'] else 'no weights'}")
    for name, value in found["environment"].items():
        click.echo(f"{name}={value}")
