"""The memory ledger and the limits that follow from it, for models that exist only as headers."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch

from tgi.core.config import BLOCK_SIZE, SCORED_ROWS, KVPool, Limits, ModelFiles
from tgi.core.errors import StartupError
from tgi.kernels import triton as kernels
from tgi.launcher import machine as machines
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.fit import Plan, choose_dtype, choose_quantize, elements, fit
from tgi.launcher.flags import Options
from tgi.launcher.machine import Machine, probe
from tgi.quantization.scheme import read_scheme

GB = 10**9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TOKEN = 3 * 2 * 2 * 16 * 4
"""Bytes of one token in the KV cache in float32: layers, k and v, kv heads, head dimension, width."""
CPU = Machine("cpu", "cpu", 16 * GB, 8 * GB)
NATIVE = Machine("cpu", "cpu", 16 * GB, 8 * GB, native=True)
GPU = Machine("cuda", "NVIDIA H100 80GB HBM3", 80 * GB, 70 * GB, gpus=((80 * GB, 70 * GB),))
TRITON = dataclasses.replace(GPU, triton=True)


def model(folder: Path, tokenizer: dict[str, object] | None = None, **config: object) -> ModelFiles:
    """A model whose only file has a header for 10 * 20 + 5 numbers."""
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tensors = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [10, 20], "data_offsets": [0, 400]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [400, 420]},
    }
    header = json.dumps(tensors).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(420))
    return ModelFiles(model_id="org/model", folder=str(folder), weights=[str(path)])


def check_consistent(plan: Plan) -> None:
    """What every plan promises."""
    limits = plan.limits
    assert 0 < limits.max_input_tokens < limits.max_total_tokens <= limits.max_batch_total_tokens
    assert limits.max_batch_total_tokens % BLOCK_SIZE == 0
    assert 0 < limits.max_batch_prefill_tokens <= limits.max_batch_total_tokens
    assert sum(plan.ledger.values()) <= plan.memory
    assert all(count >= 0 for count in plan.ledger.values())


def test_open_limits_follow_from_the_model(tmp_path: Path) -> None:
    plan = fit(Options(), model(tmp_path), CPU)
    check_consistent(plan)
    assert plan.limits == Limits(
        max_input_tokens=2047,
        max_total_tokens=2048,
        max_batch_prefill_tokens=512,
        max_batch_total_tokens=128 * 2048,
        max_batch_size=128,
    )
    assert plan.dtype == "float32"
    assert plan.memory == CPU.available
    assert plan.ledger["weights"] == 4 * 205
    assert plan.ledger["logits of 64 rows"] == SCORED_ROWS * 1000 * 40
    assert plan.ledger["KV cache of 262144 tokens"] == 262144 * TOKEN


def gemma(folder: Path, window: int) -> ModelFiles:
    """Three of four layers have a window."""
    return model(
        folder,
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=window,
        sliding_window_pattern=4,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 20,
    )


def test_a_step_has_time_enough_on_a_machine_a_hundred_times_slower_than_usual(tmp_path: Path) -> None:
    """2 operations for each of 512 tokens, each weight, and in 3 layers of 64 columns each of 2048 keys and values."""
    assert fit(Options(), model(tmp_path), CPU).longest_step == 60 + 2 * 512 * (205 + 2 * 3 * 64 * 2048) / 2e9
    assert 60 < fit(Options(), model(tmp_path), GPU).longest_step < 61


def test_layers_with_a_window_get_room_for_the_windows_of_all_requests(tmp_path: Path) -> None:
    files = gemma(tmp_path, 100)
    plan = fit(Options(max_batch_size=4, max_batch_prefill_tokens=50), files, CPU)
    check_consistent(plan)
    tokens = plan.limits.max_batch_total_tokens
    windows = -(-(4 * (100 + 32) + 50) // BLOCK_SIZE)
    assert plan.pools == [KVPool(tokens // BLOCK_SIZE), KVPool(windows, 100)]
    layer = 2 * 2 * 16 * 4
    assert plan.ledger[f"KV cache of {tokens} tokens"] == layer * (tokens + 3 * windows * BLOCK_SIZE)
    alike = fit(Options(max_batch_size=4, max_batch_prefill_tokens=50), gemma(tmp_path, 1 << 21), CPU)
    assert tokens > 2 * alike.limits.max_batch_total_tokens
    assert alike.pools[0].blocks == alike.pools[1].blocks


def test_of_latent_attention_a_token_takes_one_short_vector(tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None}
    files = model(tmp_path, architectures=["DeepseekV2ForCausalLM"], **sizes, first_k_dense_replace=3)
    options = Options(max_batch_total_tokens=2048)
    assert fit(options, files, GPU).ledger["KV cache of 2048 tokens"] == 2048 * 3 * 48 * 2
    # Where the native kernels run, values stand once more beside the keys.
    assert fit(options, files, NATIVE).ledger["KV cache of 2048 tokens"] == 2048 * 3 * (48 + 40) * 2


def test_a_small_cache_has_room_for_short_requests_in_all_layers(tmp_path: Path) -> None:
    options = Options(max_batch_total_tokens=1024, max_total_tokens=512, max_batch_prefill_tokens=50)
    assert fit(options, gemma(tmp_path, 100), CPU).pools == [KVPool(64), KVPool(64, 100)]


def test_a_token_is_copied_for_each_of_its_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 48, "head_dim": 16}
    plan = fit(Options(), model(tmp_path, architectures=["Qwen3MoeForCausalLM"], **sizes), NATIVE)
    check_consistent(plan)
    assert plan.ledger["activations of 512 tokens"] == 512 * 4 * (3 * 64 + 8 * (2 * 64 + 3 * 48))


def test_few_running_requests_can_still_ask_for_the_logits_of_their_prompts(tmp_path: Path) -> None:
    assert "logits of 128 rows" in fit(Options(), model(tmp_path), GPU).ledger
    ledger = fit(Options(max_batch_size=2), model(tmp_path), GPU).ledger
    assert ledger["logits of 64 rows"] == SCORED_ROWS * 1000 * 40
    short = Options(max_batch_size=2, max_batch_prefill_tokens=20, max_total_tokens=20, max_input_tokens=19)
    assert "logits of 20 rows" in fit(short, model(tmp_path), CPU).ledger


def test_open_limits_on_a_gpu(tmp_path: Path) -> None:
    plan = fit(Options(), model(tmp_path, max_position_embeddings=1 << 20, dtype="float16"), GPU)
    check_consistent(plan)
    assert (plan.dtype, plan.limits.max_batch_prefill_tokens) == ("float16", 4096)
    assert plan.memory == 70 * GB, "what other programs hold is not ours"
    assert fit(Options(cuda_memory_fraction=0.5), model(tmp_path), GPU).memory == 30 * GB


def test_a_tied_head_is_a_second_copy_on_cpu(tmp_path: Path) -> None:
    files = model(tmp_path, tie_word_embeddings=True)
    assert fit(Options(), files, CPU).ledger["weights"] == 4 * (205 + 1000 * 64)
    assert fit(Options(), files, GPU).ledger["weights"] == 2 * 205


def test_the_tokenizer_may_know_a_shorter_length(tmp_path: Path) -> None:
    assert fit(Options(), model(tmp_path, {"model_max_length": 100}), CPU).limits.max_total_tokens == 100
    assert fit(Options(), model(tmp_path, {"model_max_length": 1e30}), CPU).limits.max_total_tokens == 2048
    assert (
        fit(Options(max_total_tokens=200), model(tmp_path, {"model_max_length": 100}), CPU).limits.max_total_tokens
        == 200
    )


def test_what_the_operator_says_is_what_he_gets(tmp_path: Path) -> None:
    options = Options(
        max_input_tokens=100,
        max_total_tokens=200,
        max_batch_prefill_tokens=50,
        max_batch_total_tokens=1003,
        max_batch_size=7,
        max_concurrent_requests=9,
        max_best_of=3,
        max_stop_sequences=5,
        max_top_n_tokens=6,
        max_client_batch_size=8,
        validation_workers=4,
        payload_limit=10,
    )
    plan = fit(options, model(tmp_path), CPU)
    check_consistent(plan)
    for field in Limits.__struct_fields__:
        wanted = 992 if field == "max_batch_total_tokens" else getattr(options, field)  # whole pages
        assert getattr(plan.limits, field) == wanted, field


def test_a_small_cache_shortens_what_was_left_open(tmp_path: Path) -> None:
    plan = fit(Options(max_batch_total_tokens=333), model(tmp_path), CPU)
    check_consistent(plan)
    assert (plan.limits.max_batch_total_tokens, plan.limits.max_total_tokens) == (320, 320)
    assert plan.limits.max_batch_prefill_tokens == 320


def test_little_memory_shortens_requests_before_it_refuses(tmp_path: Path) -> None:
    """Down to the last page every plan is consistent; below it the start is refused, naming what to change."""
    files = model(tmp_path, max_position_embeddings=1 << 17)
    lengths = set()
    for megabytes in range(540, 1500, 13):
        machine = dataclasses.replace(CPU, available=megabytes * 10**6)
        try:
            plan = fit(Options(), files, machine)
        except ArgumentValidation as error:
            assert not lengths, "more memory never fits less"
            assert "org/model doesn't fit" in str(error) and "--cuda-memory-fraction" in str(error)
            continue
        check_consistent(plan)
        lengths.add(plan.limits.max_total_tokens)
    assert len(lengths) > 3 and max(lengths) == 1 << 17


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            Options(max_total_tokens=4096),
            "`max_total_tokens` must be <= 2048, what the model was made for. Given: 4096",
        ),
        (Options(max_input_tokens=2048), "`max_input_tokens`(2048) must be < `max_total_tokens`(2048)"),
        (Options(max_batch_total_tokens=2**31), "`max_batch_total_tokens` must be <= "),
        (
            Options(max_total_tokens=512, max_batch_total_tokens=256),
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 512 and 256",
        ),
        (
            Options(max_batch_prefill_tokens=512, max_batch_total_tokens=256),
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 512 and 256",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: Options, text: str) -> None:
    with pytest.raises(ArgumentValidation) as error:
        fit(options, model(tmp_path), CPU)
    assert text in str(error.value)


def test_a_length_that_memory_has_no_room_for_is_refused(tmp_path: Path) -> None:
    files = model(tmp_path, max_position_embeddings=1 << 20)
    with pytest.raises(ArgumentValidation, match="Not enough memory to handle `max_total_tokens=1048576`"):
        fit(Options(max_total_tokens=1 << 20), files, dataclasses.replace(CPU, available=GB))


def test_rope_flags_stretch_the_model(tmp_path: Path) -> None:
    plan = fit(Options(rope_scaling="linear", rope_factor=2.0), model(tmp_path), CPU)
    assert plan.limits.max_total_tokens == 4096


def test_gguf_weights_are_counted_by_their_index(tmp_path: Path) -> None:
    (tmp_path / "gguf_index.json").write_text(
        json.dumps({"a": {"type": "Q4_1", "shape": [32, 10]}, "b": {"type": "F32", "shape": [5]}})
    )
    assert elements(ModelFiles(model_id="m", folder=str(tmp_path), weights=["/x/model.gguf"])) == 325


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_pickled_weights_are_counted_by_their_pickle(tmp_path: Path, archive: bool) -> None:
    """A head that is the embedding counts once, masks don't count."""
    table = torch.ones(10, 4, dtype=torch.float16)
    paths = [tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "pytorch_model-00002-of-00002.bin"]
    mask = torch.ones(5, 5, dtype=torch.bool)
    state = {"embed": table, "head": table, "mask": mask}
    torch.save(state, paths[0], _use_new_zipfile_serialization=archive)
    torch.save({"more": torch.ones(7)}, paths[1], _use_new_zipfile_serialization=archive)
    files = ModelFiles(model_id="m", folder=str(tmp_path), weights=[str(path) for path in paths])
    assert elements(files) == 47


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]"])
def test_a_broken_header_is_named(tmp_path: Path, content: bytes) -> None:
    files = model(tmp_path)
    Path(files.weights[0]).write_bytes(content)
    with pytest.raises(StartupError, match=r"model\.safetensors: not a readable safetensors file"):
        elements(files)


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "chosen"),
    [
        ("auto", "cpu", "float32", "float32"),
        ("auto", "native", "float16", "bfloat16"),
        ("float32", "native", "bfloat16", "float32"),
        ("auto", "cuda", "bfloat16", "bfloat16"),
        ("auto", "cuda", "float16", "float16"),
        ("auto", "cuda", "float32", "bfloat16"),
        ("bfloat16", "cpu", "float32", "bfloat16"),
    ],
)
def test_dtype(dtype: str, device: str, stored: str, chosen: str) -> None:
    machine = {"cpu": CPU, "native": NATIVE, "cuda": GPU}[device]
    assert choose_dtype(dtype, machine, {"torch_dtype": stored}) == chosen


@pytest.mark.parametrize(
    ("options", "name", "machine", "chosen"),
    [
        ({}, "m.safetensors", "native", None),
        ({}, "m.gguf", "native", "stored"),
        ({}, "m.gguf", "cpu", None),
        ({"dtype": "float32"}, "m.gguf", "native", None),
        ({"quantize": "int8"}, "m.gguf", "native", "int8"),
        ({"quantize": "int4"}, "m.safetensors", "native", "int4"),
        ({"quantize": "fp8"}, "m.safetensors", "native", "fp8"),
        ({"quantize": "bitsandbytes-nf4"}, "m.safetensors", "native", "bitsandbytes-nf4"),
        ({}, "m.safetensors", "triton", None),
        ({}, "m.gguf", "triton", "stored"),
        ({}, "m.gguf", "gpu", None),
        ({"dtype": "bfloat16"}, "m.gguf", "triton", None),
        ({"quantize": "int4", "dtype": "float16"}, "m.safetensors", "triton", "int4"),
        ({"quantize": "eetq"}, "m.safetensors", "triton", "int8"),
    ],
)
def test_quantize(options: dict[str, str], name: str, machine: str, chosen: str | None) -> None:
    files = ModelFiles(model_id="m", folder="/x", weights=[f"/x/{name}"])
    machines = {"cpu": CPU, "native": NATIVE, "gpu": GPU, "triton": TRITON}
    assert choose_quantize(Options(**options), files, None, machines[machine]) == chosen


@pytest.mark.parametrize(
    ("config", "asked", "chosen"),
    [
        ({"quant_method": "fp8"}, "fp8", "stored"),
        ({"quant_method": "fbgemm_fp8"}, "fp8", "stored"),
        ({"quant_method": "fp8"}, None, "stored"),
        ({"quant_method": "fp8"}, "int8", "int8"),
        ({"quant_method": "fp8"}, "compressed-tensors", None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "stored"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-fp4", "stored"),
        (None, "compressed-tensors", None),
        ({"quant_method": "gptq", "bits": 4}, "gptq", "stored"),
        ({"quant_method": "gptq", "bits": 4}, "awq", None),
        ({"quant_method": "gptq", "bits": 4}, "eetq", None),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin", "stored"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq", None),
        ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "marlin_24"}, "marlin", "stored"),
        ({"quant_method": "intel/auto-round", "bits": 4}, "gptq", "stored"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"}, "awq", "stored"),
        ({"quant_method": "awq", "bits": 4}, "awq", "stored"),
        ({"quant_method": "awq", "bits": 4}, "gptq", "stored"),  # as TGI, which converts it
        ({"quant_method": "eetq"}, "eetq", "stored"),
        ({"quant_method": "exl2"}, "exl2", "stored"),
        ({"w_bit": 4, "version": "GEMM"}, "awq", "stored"),
        ({"bits": 4}, "gptq", "stored"),
        (None, "eetq", "int8"),
        (None, "gptq", None),
        (None, "exl2", None),
        (None, "marlin", None),
        (None, "hqq", None),
    ],
)
def test_a_name_of_the_checkpoint_s_own_format(
    config: dict[str, object] | None, asked: str | None, chosen: str | None
) -> None:
    files = ModelFiles(model_id="m", folder="/x", weights=["/x/m.safetensors"])
    scheme = read_scheme({"quantization_config": config})
    if chosen is not None:
        assert choose_quantize(Options(quantize=asked), files, scheme, NATIVE) == chosen
        return
    with pytest.raises(ArgumentValidation, match=f"--quantize {asked}"):
        choose_quantize(Options(quantize=asked), files, scheme, NATIVE)


def test_quantize_needs_the_kernels_that_multiply_it(tmp_path: Path) -> None:
    for machine in (CPU, GPU):
        with pytest.raises(ArgumentValidation, match="--quantize int8"):
            fit(Options(quantize="int8"), model(tmp_path), machine)
    with pytest.raises(ArgumentValidation, match="--dtype"):
        fit(Options(quantize="int4", dtype="float16"), model(tmp_path), NATIVE)


@pytest.mark.parametrize(("machine", "kind"), [(NATIVE, "int8"), (NATIVE, "fp8_e5m2"), (GPU, "fp8_e4m3fn")])
def test_a_cache_of_bytes_holds_more_tokens(tmp_path: Path, machine: Machine, kind: str) -> None:
    options = {"max_concurrent_requests": 1 << 20, "max_batch_size": 8}
    plain, small = (
        fit(Options(kv_cache_dtype=each, **options), model(tmp_path), machine).limits.max_batch_total_tokens
        for each in (None, kind)
    )
    assert 1.5 * plain < small


def test_a_cache_in_int8_is_our_own_kernels_alone(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValidation, match="--kv-cache-dtype int8"):
        fit(Options(kv_cache_dtype="int8"), model(tmp_path), GPU)


def test_quantized_weights_are_billed_as_what_they_are(tmp_path: Path) -> None:
    files = model(tmp_path, vocab_size=1)
    plain, eight, four = (
        fit(Options(quantize=kind), files, NATIVE).ledger["weights"] for kind in (None, "int8", "int4")
    )
    assert plain == 2 * 205
    assert four < eight < plain
    # On a GPU the embedding stays as it is.
    assert fit(Options(quantize="int8"), files, TRITON).ledger["weights"] == int(eight + 64 * (2 - 1.125))


def test_what_transformers_reads_is_billed_before_it_is_rounded(tmp_path: Path) -> None:
    """And a tied head is packed beside the embedding."""
    files = model(tmp_path, architectures=["OddForCausalLM"], model_type="odd", vocab_size=1, tie_word_embeddings=True)
    plain, eight = (fit(Options(quantize=kind), files, NATIVE).ledger["weights"] for kind in (None, "int8"))
    assert plain == eight == 2 * (205 + 64)


def machine_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       1000 kB\nMemFree:   1 kB\nMemAvailable:    800 kB\n"


@pytest.mark.parametrize(
    ("groups", "available"),
    [
        ({}, 800 << 10),
        (
            {
                "proc/self/cgroup": "0::/box\n",
                "sys/fs/cgroup/box/memory.max": "500000\n",
                "sys/fs/cgroup/box/memory.current": "300000\n",
                "sys/fs/cgroup/box/memory.stat": "anon 1\ninactive_file 100000\n",
            },
            300000,
        ),
        (
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/inner/memory.max": "max\n",
                "sys/fs/cgroup/outer/inner/memory.current": "1\n",
                "sys/fs/cgroup/outer/inner/memory.stat": "inactive_file 0\n",
                "sys/fs/cgroup/outer/memory.max": "400000\n",
                "sys/fs/cgroup/outer/memory.current": "1000\n",
                "sys/fs/cgroup/outer/memory.stat": "inactive_file 0\n",
            },
            399000,
        ),
        (
            {  # inside a container the path is that of the host, and the files lie at the top
                "proc/self/cgroup": "4:cpu:/docker/abc\n3:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "200000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "50000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10000\n",
            },
            160000,
        ),
    ],
)
def test_memory_is_what_the_machine_and_its_groups_leave(
    tmp_path: Path, groups: dict[str, str], available: int
) -> None:
    root = machine_files(tmp_path, {"proc/meminfo": MEMINFO} | groups)
    assert machines._cpu(root).available == available


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of this name that notes its arguments and prints the file ``says``."""
    command = tmp_path / "nvidia-smi"
    command.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\nexec cat {tmp_path}/says\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_gpu_is_found_by_nvidia_smi(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "version", lambda _: "2.11.0+cu130")
    monkeypatch.setattr(machines, "lacking", lambda capability: None if capability == 9.0 else "another")
    h100, t4 = "NVIDIA H100 80GB HBM3, 81559, 80000, 9.0\n", "NVIDIA T4, 15360, 15000, 7.5\n"
    (nvidia_smi / "says").write_text(h100 + t4)
    found = probe("auto", None)
    assert found == Machine(
        "cuda",
        "NVIDIA H100 80GB HBM3",
        81559 << 20,
        80000 << 20,
        gpus=((81559 << 20, 80000 << 20), (15360 << 20, 15000 << 20)),
    )
    (nvidia_smi / "says").write_text(h100)
    assert probe("auto", None).triton
    assert found.compute_type(2) == "2-nvidia-h100-80gb-hbm3"
    assert found.part(1) == found and found.part(2).available == 15000 << 20
    probe("cuda", "2,3")
    assert (nvidia_smi / "asked").read_text().strip().endswith("-i 2,3")
    for device, visible in (("cpu", None), ("auto", ""), ("auto", "-1")):
        assert probe(device, visible).device == "cpu"


def test_what_triton_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: "there")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name == "clang")
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "Python.h")
    assert kernels.lacking(8.0) is None
    assert "7.5" not in str(kernels.lacking(7.5)) and "8.0" in str(kernels.lacking(7.5))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert kernels.lacking(9.0) == "Python's headers"
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.lacking(9.0) == "a C compiler"
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert kernels.lacking(9.0) == "to be installed"


def test_a_gpu_is_of_no_use_to_a_torch_for_cpus(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "version", lambda _: "2.13.0+cpu")
    (nvidia_smi / "says").write_text("NVIDIA T4, 15360, 15000, 7.5\n")
    assert probe("auto", None).device == "cpu"
    with pytest.raises(ArgumentValidation, match=r"torch 2\.13\.0\+cpu is built for CPUs only"):
        probe("cuda", None)


@pytest.mark.parametrize(("build", "device"), [("2.11.0+rocm7.1", "cuda"), ("2.11.0+xpu", "xpu")])
def test_other_makers_gpus_are_those_that_torch_sees(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, build: str, device: str
) -> None:
    monkeypatch.setattr(machines, "version", lambda _: build)
    monkeypatch.setattr(machines, "lacking", lambda capability: None if capability is None else "another")
    torch_of = "import sys; assert sys.argv[1] == {!r}; print({!r})"
    monkeypatch.setattr(machines, "_ASK", torch_of.format(device, '[["MI300X", 90, 100], ["MI300X", 70, 80]]'))
    expected = Machine(device, "MI300X", 100, 90, triton=True, gpus=((100, 90), (80, 70)))
    assert probe("auto", None) == probe(device, None) == expected
    assert expected.kind == "gpu" and probe("cpu", None).device == "cpu"
    monkeypatch.setattr(machines, "_ASK", "print([])")
    assert probe("auto", None).device == "cpu"
    with pytest.raises(ArgumentValidation, match="torch finds no GPU"):
        probe(device, None)
    with pytest.raises(ArgumentValidation, match=f"is built for `--device {device}`"):
        probe("xpu" if device == "cuda" else "cuda", None)
    monkeypatch.setattr(machines, "_ASK", "raise SystemExit(3)")
    assert probe("auto", None).device == "cpu" and "torch can't say" in caplog.text


def test_torch_can_be_asked_for_its_gpus() -> None:
    """On what is here: a module without GPUs, or with."""
    found = machines._asked("cuda")
    assert found is None or found.device == "cuda"


def test_no_gpu(nvidia_smi: Path) -> None:
    (nvidia_smi / "says").write_text("No devices were found\n")
    assert probe("auto", None).device == "cpu"
    with pytest.raises(ArgumentValidation, match="--device cuda"):
        probe("cuda", None)


def test_the_table_has_a_line_for_every_row(tmp_path: Path) -> None:
    plan = fit(Options(), model(tmp_path), CPU)
    lines = plan.table().splitlines()
    assert [line.split("  ")[1].strip() for line in lines] == list(plan.ledger)
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (Options(max_batch_size=1), [1]),
        (Options(max_batch_size=16), [1, 2, 4, 6, 8, 10, 12, 16]),
        (Options(max_batch_size=70), [1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 70]),
        (Options(max_batch_size=16, cuda_graphs=(32, 8, 0, 1, 8)), [1, 8]),
        (Options(cuda_graphs=(0,)), []),
    ],
)
def test_graphs_are_captured_for_what_is_asked_or_a_ladder(tmp_path: Path, options: Options, sizes: list[int]) -> None:
    plan = fit(options, model(tmp_path), TRITON)
    check_consistent(plan)
    assert plan.graphs == sizes
    assert [name for name in plan.ledger if "graphs" in name] == ([f"graphs of {len(sizes)} sizes"] if sizes else [])


def test_where_there_are_no_graphs_only_a_gpu_s_operator_is_told(tmp_path: Path) -> None:
    files = model(tmp_path)
    assert fit(Options(), files, GPU).graphs == fit(Options(cuda_graphs=(1, 2)), files, CPU).graphs == []
    for machine, attention in ((GPU, None), (TRITON, "flashinfer")):
        with pytest.raises(ArgumentValidation, match="`--cuda-graphs` needs"):
            fit(Options(cuda_graphs=(1, 2), attention=attention), files, machine)


def test_what_cannot_be_deterministic_is_refused(tmp_path: Path) -> None:
    files = model(tmp_path)
    asked = Options(deterministic=True)
    for machine in (NATIVE, TRITON):
        fit(asked, files, machine)
    for options, machine in (
        (asked, CPU),
        (asked, GPU),
        (dataclasses.replace(asked, dtype="float16"), NATIVE),
        (dataclasses.replace(asked, attention="flashinfer"), TRITON),
    ):
        with pytest.raises(ArgumentValidation, match="`--deterministic` needs our own kernels"):
            fit(options, files, machine)


def test_flashinfer_is_for_gpus_and_takes_memory_of_its_own(tmp_path: Path) -> None:
    own, theirs = (fit(Options(attention=name), model(tmp_path), TRITON) for name in (None, "flashinfer"))
    assert theirs.ledger["attention"] == own.ledger["attention"] + (136 << 20)
    assert not theirs.graphs
    with pytest.raises(ArgumentValidation, match="`--attention flashinfer` runs on NVIDIA's GPUs, not on cpu"):
        fit(Options(attention="flashinfer"), model(tmp_path), NATIVE)
