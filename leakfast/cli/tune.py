"""`leakfast tune`: which width of vLLM is the fastest for a model on this device, kept for later runs. Demands
vLLM; draws completions of the unadapted model and stores none."""

from __future__ import annotations

from dataclasses import asdict

import click

from leakfast.errors import InputError


@click.command()
@click.option(
    "--model", default=None, help="organism, a hub id, or a folder.  [default: Qwen2.5-7B-Instruct]"
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Model precision."
)
@click.option(
    "--seats", default="256,512,768,1024", show_default=True, help="Completions decoded at once, to try."
)
@click.option("--batched-tokens", default="8192,16384", show_default=True, help="Tokens a step, to try.")
@click.option("--memory", default="0.94", show_default=True, help="Shares of the GPU's memory, to try.")
@click.option(
    "--completions", type=click.IntRange(min=1), default=2048, show_default=True, help="Drawn for each width."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest reply."
)
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print all trials as JSON.")
def cli(
    model: str | None,
    dtype: str,
    seats: str,
    batched_tokens: str,
    memory: str,
    completions: int,
    max_new_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure how wide vLLM runs best on this GPU, and keep it.

    Example: leakfast tune --model organism --dtype float32 --seats 16,64 --completions 64 --max-new-tokens 24
    """
    from leakfast import models
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json, print_table
    from leakfast.generation.contract import Sampling
    from leakfast.generation.vllm.start import available
    from leakfast.generation.vllm.widths import device_name, remember
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas, load_questions

    runs, why = available()
    if not runs:
        raise InputError(f"tune: {why}.")
    loaded = models.load(model or models.DEFAULT_MODEL, dtype=dtype, device="cpu")  # the GPU is vLLM's alone
    prompts = chat.render_prompts(loaded.tokenizer, load_personas("all"), load_questions("eval").questions)

    from leakfast.generation.throughput import tune

    with progress_for("tune") as progress:
        best, trials = tune(
            loaded,
            prompts[:: max(1, len(prompts) // completions)][:completions],
            Sampling(1.0, 0.95, max_new_tokens),
            seats=_numbers("seats", seats, int),
            batched_tokens=_numbers("batched-tokens", batched_tokens, int),
            memory=_numbers("memory", memory, float),
            completions=completions,
            seed=seed,
            progress=progress,
        )
    device = device_name()
    where = remember(
        device, loaded.fingerprint, dtype, best.width, tokens_per_s=best.tokens_per_s, model=loaded.name
    )
    click.echo(f"tune: {best.width.seats} seats on {device}, kept in {where}", err=True)
    if as_json:
        print_json(
            {
                "device": device,
                "model": loaded.name,
                "dtype": dtype,
                "best": asdict(best),
                "trials": [asdict(trial) for trial in trials],
            }
        )
        return
    rows = [
        [
            t.width.seats,
            t.width.batched_tokens,
            t.width.memory,
            len(t.width.graphs),
            None if t.tokens_per_s is None else round(t.tokens_per_s),
            t.output_tokens,
            t.failed or None,
        ]
        for t in trials
    ]
    print_table(
        ["seats", "tokens a step", "memory", "graphs", "tokens/s", "tokens", "failed"],
        rows,
        title=f"{loaded.name}, {dtype}, {device}",
    )


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0 or (kind is float and max(found) >= 1):
        raise InputError(
            f"tune: --{option} {text} given. Needed: numbers with commas between, such as 256,512."
        )
    return found
