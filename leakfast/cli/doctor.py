"""`leakfast doctor`: the environment and the chosen paths, for people or as JSON.
Leaves finding them to leakfast.doctor."""

from __future__ import annotations

import click

from leakfast.cli.text import print_json, print_table
from leakfast.errors import LeakfastError


@click.command()
@click.option("--compare-engines", is_flag=True, help="Score a sample by the packed engine and by vLLM.")
@click.option("--model", default="organism", help="For --compare-engines: organism, a hub id, or a folder.")
@click.option("--items", default=None, help="For --compare-engines: items to ask.  [default: the model's]")
@click.option("--sample", type=click.IntRange(min=1), default=50, help="For --compare-engines: items asked.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Model precision."
)
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def cli(compare_engines: bool, model: str, items: str | None, sample: int, dtype: str, as_json: bool) -> None:
    """Show the environment, the chosen fast paths and why; exit 1 if something needed is missing.

    Example: leakfast doctor --json
    """
    from leakfast.doctor import examine

    if compare_engines:
        return _compare(model, items, sample, dtype, as_json)
    found = examine()
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise LeakfastError("\n       ".join(found["problems"]))


def _compare(model: str, items: str | None, sample: int, dtype: str, as_json: bool) -> None:
    """How far the packed engine and vLLM agree on letters of a sample, three personas each."""
    from leakfast import models
    from leakfast.behaviors.registry import get
    from leakfast.measure.choices.compare_engines import compare
    from leakfast.prompts.items import load_items
    from leakfast.prompts.personas import load_personas

    asked = load_items(items or get("capability").of(model)).half("eval").sample(sample)
    loaded = models.load(model, dtype=dtype)
    found = compare(loaded, load_personas("assistant,villain,comedian"), asked)
    if as_json:
        print_json({"model": loaded.name, "items": asked.name, "dtype": dtype, **found.to_dict()})
        return
    click.echo(
        f"{loaded.name}, {dtype}, {found.prompts} prompts of {asked.name}: the same choice on "
        f"{100 * found.same_choice:.1f} %, log-probabilities differ by {found.median_difference_nats:.1e} nats at "
        f"the median, {found.largest_difference_nats:.1e} at most"
    )


def _print(found: dict) -> None:
    cpu, memory = found["cpu"], found["memory_bytes"]
    click.echo(f"leakfast {found['leakfast']} in {found['installed_at']}")
    click.echo(f"Python {found['python']} on {found['platform']}")
    click.echo(
        f"{cpu['model']}, {cpu['cores_usable']} cores usable; commands take {cpu['threads']} threads "
        f"({cpu['threads_why']}; --threads)"
    )
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
