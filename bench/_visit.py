"""The parts of a visit to a GPU that is lent for minutes, in order of their value, and the same at tiny shapes for a
rehearsal on a CPU. Runs nothing. Seconds are reckoned, none is measured."""

from __future__ import annotations

import importlib.machinery
import sys

from _running import ROOT, Part

ENGINE = ("torch", "transformers", "numpy", "click", "safetensors")
KERNELS = (*ENGINE, "triton")
TRAINING = (*ENGINE, "pydantic", "peft", "numba")
GENERATION = (*ENGINE, "pydantic", "peft", "vllm")
TUNED = {"LEAKFAST_AUTOTUNE": "1"}


def on_gpu(tests: list[str], python: str = sys.executable) -> list[Part]:
    """For a CUDA device. tests: what runs the GPU tests."""

    def bench(script: str, words: str = "") -> list[str]:
        return [python, f"bench/{script}.py", "--device", "cuda", *words.split()]

    few = "--sample 111 --sizes 128,256 --sweep 555 --repeats 5"
    letters = "--items 24 --sample 111 --sizes 64 --repeats 5"
    training = "--shape qwen2.5-0.5b --dtype bfloat16 --n-rows 64 --batch-size 16 --sides packed,padded"
    company = "--shape qwen2.5-7b --dtype bfloat16 --adapters 6 --n-rows 16 --batch-size 16"
    again = "--sample 40 --sizes 128 --repeats 3"
    found = [
        Part("smoke", bench("smoke"), 110, KERNELS, reckoned_s=60),
        Part("centroids", bench("bench_centroids", few), 150, ENGINE, reckoned_s=75),
        Part("choices", bench("bench_choices", letters), 120, KERNELS, reckoned_s=55),
        Part("kernels", bench("bench_kernels", "--repeats 7 --compiled 2"), 120, KERNELS, reckoned_s=70),
        Part("generate", bench("visit_generate"), 360, GENERATION, least_s=150, reckoned_s=260),
        Part("train", bench("bench_train", training), 90, TRAINING, least_s=20, reckoned_s=45),
        Part("company", bench("bench_company", company), 120, TRAINING, least_s=40, reckoned_s=70),
        Part("tests", tests, 150, (*KERNELS, "pytest", "hypothesis"), least_s=20, reckoned_s=80),
        Part("autotune", bench("bench_centroids", again), 120, KERNELS, TUNED, least_s=30, reckoned_s=60),
    ]
    build = [python, "setup.py", "build_ext", "--inplace"]
    return found if has_native() else [Part("build", build, 60, ("pybind11",), reckoned_s=20), *found]


def rehearsal(tests: list[str], python: str = sys.executable) -> list[Part]:
    """The same parts on a CPU at tiny shapes: does it run through, and does the clock end it?"""

    def bench(script: str, words: str = "") -> list[str]:
        return [python, f"bench/{script}.py", *words.split()]

    tiny = "--shape tiny --personas 3 --repeats 2 --dtype bfloat16"
    centroids = f"{tiny} --questions 4 --layers 0,2 --sizes 4,8"
    training = "--n-rows 4 --rank 4 --batch-size 2 --repeats 1 --sides packed,padded"
    made = [
        Part("smoke", bench("smoke", "--rehearse"), 900, ENGINE),
        Part("centroids", bench("bench_centroids", f"{centroids} --sample 6"), 900, ENGINE),
        Part("choices", bench("bench_choices", f"{tiny} --items 4 --sizes 2,4"), 900, ENGINE),
        Part("kernels", bench("bench_kernels", "--rehearse --repeats 2"), 900, ENGINE),
        Part("generate", bench("visit_generate"), 900, (*ENGINE, "pydantic", "peft")),
        Part("train", bench("bench_train", training), 900, TRAINING),
        Part(
            "company",
            bench("bench_company", f"{training.replace('packed', 'together')} --adapters 2"),
            900,
            TRAINING,
        ),
        Part("tests", [*tests, "--collect-only"], 900, (*ENGINE, "pytest", "hypothesis")),
        Part("autotune", bench("bench_centroids", f"{centroids} --sample 2"), 900, ENGINE, TUNED),
    ]
    return [part._replace(least_s=0.2) for part in made]


def has_native() -> bool:
    """Whether the compiled extension of this Python lies in the source."""
    names = (f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return any((ROOT / "leakfast" / name).is_file() for name in names)
