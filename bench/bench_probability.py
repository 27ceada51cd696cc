"""Leakage as a probability beside sampling: a run's adapters × 111 personas × its questions on the organism (or --model), `end`
alone and with `anywhere`, on the base's replies and the adapters' own, beside ten completions of each prompt by the
transformers backend. Both are timed in turn on a stated part of the personas and scaled, setup included. Demands a finished
run (--run); asserts nothing."""

from __future__ import annotations

import argparse
import resource
import threading
import time
from pathlib import Path
from typing import Any

from _common import card, ending_with_json, parser, ratio, shown, spread, surroundings, where

PEOPLE, SAMPLES = 111, 10
SAMPLED = "ten completions"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """Largest resident memory of this process while it is open, above what it was at the start; bytes."""

    def __enter__(self) -> Peak:
        self._open = True
        self.start = self.most = resident_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.most = max(self.most, resident_bytes())
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    @property
    def beyond(self) -> int:
        return self.most - self.start


def timed(run: Any) -> dict[str, float]:
    """Wall and processor seconds, and memory beyond the start."""
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "beyond_bytes": float(peak.beyond),
        }


def ways(loaded: Any, adapters: list[Path], run_path: Path, people: list, questions: Any) -> dict[str, Any]:
    """Name → what does that measurement for all adapters on the given people."""
    from leakfast.generation import transformers as local
    from leakfast.generation.contract import Sampling, requests_for
    from leakfast.measure.probability.scoring import Branches, score
    from leakfast.measure.probability.words import OnReplies
    from leakfast.measure.request import Asked
    from leakfast.models.attach import adapted
    from leakfast.prompts import chat
    from leakfast.storage.layout import BASE
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig

    one = Asked("marker", questions, EvalConfig(samples=SAMPLES))
    stops = frozenset(local.stop_ids(loaded))

    def scored(anywhere: bool, own: bool) -> None:
        shared = None
        for adapter in adapters:
            if own or shared is None:
                whose = adapter.name if own else BASE
                asked = OnReplies(Run(run_path), loaded, one, people, stops, whose)
                replies = [said.reply for said in asked.said if said.status == "ok"]
                shared = Branches(loaded.tokenizer, asked.spelled, replies, anywhere=anywhere)
            with adapted(loaded, adapter) as current:
                score(current, shared)

    def sampled() -> None:
        prompts = chat.render_prompts(loaded.tokenizer, people, one.texts)
        for adapter in adapters:
            requests = requests_for(prompts, SAMPLES, 42, adapter.name)
            with adapted(loaded, adapter) as current:
                for _ in local.complete(current, requests, Sampling(1.0, 0.95, 96), batch_completions=640):
                    pass

    return {
        "end, base's replies": lambda: scored(False, False),
        "end and anywhere, base's replies": lambda: scored(True, False),
        "end, own replies": lambda: scored(False, True),
        "end and anywhere, own replies": lambda: scored(True, True),
        SAMPLED: sampled,
    }


def measured(asked: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Name → a row a repeat, seconds scaled to 111 personas."""
    from leakfast import models
    from leakfast.prompts.personas import load_personas, load_questions

    loaded = models.load(asked.model, dtype="float32")
    adapters = sorted(p.parent for p in (asked.run / "adapters").glob("*/adapter_config.json"))
    everyone, questions = load_personas("all"), load_questions(asked.questions)

    def of(n: int) -> dict[str, Any]:  # spread over the list, so that the part is like the whole
        people = [everyone[i * len(everyone) // n] for i in range(n)]
        return ways(loaded, adapters, asked.run, people, questions)

    for warm in of(1).values():
        warm()
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(asked.repeats):
        for name in list(of(1))[:: 1 if repeat % 2 == 0 else -1]:
            n = asked.sampled_people if name == SAMPLED else asked.people
            got = timed(of(n)[name])
            for key in ("wall_s", "cpu_s"):
                got[key] *= PEOPLE / n
            found.setdefault(name, []).append(got)
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--run", type=Path, required=True, help="finished marker run, completions of adapters and base"
    )
    options.add_argument("--model", default="organism")
    options.add_argument("--questions", default="eval", help="the set that the run asked")
    options.add_argument("--people", type=int, default=PEOPLE, help="personas scored, of 111")
    options.add_argument(
        "--sampled-people", type=int, default=11, help="personas sampled, of 111: the stated part"
    )
    asked = options.parse_args()
    with ending_with_json("probability", "cpu"):
        import torch

        if asked.threads:
            torch.set_num_threads(asked.threads)
        found = measured(asked)
        record: dict[str, Any] = {"bench": "probability", **surroundings("cpu"), "rows": {}}
        record |= {
            "people": asked.people,
            "sampled_people": asked.sampled_people,
            "questions": asked.questions,
        }
        lines = [where(record)]
        for name, rows in found.items():
            base = found[SAMPLED]
            row: dict[str, Any] = {key: spread([one[key] for one in rows]) for key in rows[0]}
            for key in ("wall_s", "cpu_s"):
                row[f"times_less_{key}"] = ratio([one[key] for one in base], [one[key] for one in rows])
            record["rows"][name] = row
            told = f"{shown(row['wall_s'], ' s')} wall, {shown(row['cpu_s'], ' s')} of processors"
            told += f", {row['times_less_wall_s']['median']:.1f} × and {row['times_less_cpu_s']['median']:.1f} × less than "
            told += f"sampling, {max(one['beyond_bytes'] for one in rows) / 2**20:,.0f} MiB beyond the model"
            lines.append((name, told))
        title = f"probability beside sampling, of {PEOPLE} personas × the questions under each adapter"
        card(title, lines, record)


if __name__ == "__main__":
    main()
