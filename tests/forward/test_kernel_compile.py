"""Every shipped config of the Triton kernels compiled ahead of time for sm_90, without a GPU: registers, stack
and shared memory are read from the machine code and printed (`pytest -rP`), and nothing may spill."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no wheel for this machine", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leakfast.kernels import (
    add_norm,
    choice_logprobs,
    divergences,
    fp8_rows,
    gated,
    last_token_centroids,
    rope,
)

pytestmark = pytest.mark.long

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = 227 << 10  # bytes a block may have on Hopper
POINTERS = {
    "token_ids": "*i64",
    "logits": "*fp32",
    "maxima": "*fp32",
    "sums": "*fp32",
    "squares": "*fp32",
    "logprobs": "*fp32",
    "lse": "*fp32",
    "normal": "*fp32",
    "parts": "*fp32",
    "out": "*fp32",
    "leaf_rows": "*i64",
    "offsets": "*i64",
    "scales": "*fp32",
    "eps": "fp32",
}
ELEMENTS = ("hidden", "head", "states", "states_p", "states_q", "q", "k", "cos", "sin", "gate", "up")
ELEMENTS += ("x", "y", "weight", "total", "normed")


def compile_for_hopper(
    kernel, element, constants, multiples_of_16, warps, stages, folder, monkeypatch, out=None
):
    """(registers, stack bytes, local bytes, shared bytes, PTX) of one kernel for sm_90."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    names = kernel.arg_names
    known = POINTERS | dict.fromkeys(ELEMENTS, element) | (out or {})
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in multiples_of_16]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    done = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    registers, stack, local = (int(used[name]) for name in ("REG", "STACK", "LOCAL"))
    shared = made.metadata.shared
    print(
        f"{kernel.__name__} {constants}: {registers} registers, {stack + local} bytes spilled, {shared} shared"
    )
    return registers, stack, local, shared, made.asm["ptx"]


def check(usage):
    registers, stack, local, shared, _ = usage
    assert stack == 0 and local == 0, f"{stack + local} bytes spilled"
    assert 0 < registers <= 255 and shared <= SHARED_LIMIT


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize(
    ("config", "element", "aligned"),
    [
        *((c, "*bf16" if size == 2 else "*fp32", True) for (_, size), c in choice_logprobs.CONFIGS.items()),
        (choice_logprobs.RAGGED, "*bf16", False),
    ],
)
def test_choice_logprobs_fits(config, element, aligned, tmp_path, monkeypatch):
    constants = {
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "TILES": config.tiles,
        "EVEN_D": aligned,
        "AS_FLOAT32": element == "*fp32",
    }
    sixteens = ("d", "stride_hn", "stride_vn") if aligned else ()
    usage = compile_for_hopper(
        choice_logprobs._vocabulary_kernel,
        element,
        constants,
        sixteens,
        config.num_warps,
        config.num_stages,
        tmp_path,
        monkeypatch,
    )
    check(usage)
    if aligned and config.block_n >= 64:
        assert "wgmma" in usage[-1], "Hopper's matrix instructions are not used"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
def test_the_second_pass_fits(tmp_path, monkeypatch):
    rows, parts, warps = choice_logprobs.MERGE
    constants = {"BLOCK_N": rows, "BLOCK_P": parts}
    kernel = choice_logprobs._merge_kernel
    check(compile_for_hopper(kernel, "", constants, (), warps, 3, tmp_path, monkeypatch))


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_the_choices_fit(element, tmp_path, monkeypatch):
    block_d, warps = choice_logprobs.CHOSEN
    sixteens = ("d", "stride_hn", "stride_vn")
    usage = compile_for_hopper(
        choice_logprobs._chosen_kernel,
        element,
        {"BLOCK_D": block_d},
        sixteens,
        warps,
        3,
        tmp_path,
        monkeypatch,
    )
    check(usage)
    assert re.search(r"ld\.global\S*\.v4\.b32", usage[-1]), "loads are not 16 bytes wide"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("config", "element"),
    [(c, element) for c in last_token_centroids.CONFIGS.values() for element in ("*bf16", "*fp32")],
)
def test_last_token_centroids_fits(config, element, add, tmp_path, monkeypatch):
    constants = {"stride_d": 1, "ADD": add, "BLOCK_R": config.block_r, "BLOCK_D": config.block_d}
    usage = compile_for_hopper(
        last_token_centroids._last_token_centroids_kernel,
        element,
        constants,
        ("d", "stride_t"),
        config.num_warps,
        config.num_stages,
        tmp_path,
        monkeypatch,
    )
    check(usage)
    assert re.search(r"ld\.global\S*\.v4\.b32", usage[-1]), "loads are not 16 bytes wide"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize(
    ("config", "element", "aligned"),
    [
        *((c, "*bf16" if size == 2 else "*fp32", True) for (_, size), c in divergences.CONFIGS.items()),
        (divergences.RAGGED, "*bf16", False),
    ],
)
def test_divergences_fit(config, element, aligned, compare, tmp_path, monkeypatch):
    constants = {
        "COMPARE": compare,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "TILES": config.tiles,
        "EVEN_D": aligned,
        "AS_FLOAT32": element == "*fp32",
    }
    usage = compile_for_hopper(
        divergences._tiles_kernel,
        element,
        constants,
        ("d", "stride_pn", "stride_qn", "stride_vn") if aligned else (),
        config.num_warps,
        config.num_stages,
        tmp_path,
        monkeypatch,
    )
    check(usage)
    if aligned and config.block_n >= 64:
        assert "wgmma" in usage[-1], "Hopper's matrix instructions are not used"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("total", [False, True])
def test_the_merges_of_divergences_fit(total, tmp_path, monkeypatch):
    rows, parts, warps = divergences.MERGE
    constants = {"TOTAL": total, "BLOCK_N": rows, "BLOCK_P": parts}
    kernel = divergences._merge_kernel
    check(compile_for_hopper(kernel, "", constants, (), warps, 3, tmp_path, monkeypatch))


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("element", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("heads", [(28, 4, 128), (14, 2, 64), (9, 3, 64)], ids=["7B", "0.5B", "SmolLM2"])
def test_rope_fits(heads, element, tmp_path, monkeypatch):
    sixteens = ("stride_q", "stride_k", "stride_cos", "stride_sin")
    given = rope._rope_kernel, element, rope.constants(*heads), sixteens, rope.WARPS, 3
    usage = compile_for_hopper(*given, tmp_path, monkeypatch)
    check(usage)
    assert re.search(r"(ld|st)\.global\S*\.v[24]\.b32", usage[-1]), "loads are not wide"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("element", ["*bf16", "*fp16", "*fp32"])
def test_gated_fits(element, tmp_path, monkeypatch):
    given = gated._gated_kernel, element, {"BLOCK": gated.BLOCK}, ("n",), gated.WARPS, 3
    usage = compile_for_hopper(*given, tmp_path, monkeypatch)
    check(usage)
    assert re.search(r"ld\.global\S*\.v4\.b32", usage[-1]), "loads are not 16 bytes wide"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("d", [576, 896, 3584, 8192])
def test_add_norm_fits(d, element, tmp_path, monkeypatch):
    constants = {"BLOCK_D": triton.next_power_of_2(d)}
    given = (
        add_norm._add_norm_kernel,
        element,
        constants,
        ("d", "stride_x", "stride_y"),
        add_norm.warps_for(d),
        3,
    )
    usage = compile_for_hopper(*given, tmp_path, monkeypatch)
    check(usage)
    assert re.search(r"ld\.global\S*\.v4\.b32", usage[-1]), "loads are not 16 bytes wide"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason="this triton brings no cuobjdump")
def test_fp8_rows_fits(tmp_path, monkeypatch):
    given = (
        fp8_rows._fp8_rows_kernel,
        "*bf16",
        {"BLOCK": fp8_rows.BLOCK},
        ("d", "stride_x"),
        fp8_rows.WARPS,
        3,
    )
    usage = compile_for_hopper(*given, tmp_path, monkeypatch, out={"out": "*fp8e4nv"})
    check(usage)
    assert "cvt.rn.satfinite.e4m3x2" in usage[-1], "Hopper's conversion is not used"
