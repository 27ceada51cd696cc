"""How the files of tests are dealt to the processes that share them: the longest first, since one that began last would go on
alone, and those of vLLM to one process. Demands pytest-xdist; holds no tests."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling

# one process imports vLLM for them all, and no two hold engines' memory
VLLM = (
    "tests/generation/test_vllm.py",
    "tests/generation/test_vllm_steered.py",
    "tests/generation/test_vllm_tune.py",
    "tests/measure/test_compare_engines.py",
    "tests/judge/test_local.py",
)
# of the others those that take about 20 s and more, longest first; files that are not named follow in the order of their names
LONGEST = (
    "tests/cluster/test_workers.py",
    "tests/measure/test_partial.py",
    "tests/generation/test_vllm_parallel.py",
    "tests/cli/test_train.py",
    "tests/cluster/test_ray.py",
    "tests/pipeline/test_matching.py",
    "tests/forward/test_bench.py",
    "tests/measure/test_completions.py",
    "tests/forward/test_kernel_divergences.py",
    "tests/forward/test_kernel_choice_logprobs.py",
    "tests/pipeline/test_stages.py",
    "tests/storage/test_interrupts.py",
    "tests/pipeline/test_behaviors.py",
    "tests/pipeline/test_mitigations.py",
    "tests/test_packaging.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_show.py",
    "tests/pipeline/test_checks_again.py",
    "tests/train/test_search.py",
    "tests/organism/test_organism.py",
)
_PLACES = {file: place for place, file in enumerate((*VLLM, *LONGEST))}


def place_of(file: str) -> int:
    """The place of a file in the order in which files are dealt."""
    return _PLACES.get(file, len(_PLACES))


class Dealing(LoadFileScheduling):
    """File by file, in the order of collection, and those of vLLM as one."""

    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by the number of tests, which says little of their time

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "vllm" if file in VLLM else file
