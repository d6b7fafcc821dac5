"""The table of settings: every row from the command line, from the environment, with a bad value, and refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tgi_names import TGI_NAMES
from tgi.core.config import CALL_PARSERS, REASONING_PARSERS
from tgi.launcher import flags
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.flags import FLAGS, PROGRAMS, VARIABLES, Command, Flag, Options, check, parse
from tgi.router import formats

# Every flag of TGI's launcher with its default there; None: unset. Ours differs where the comment says so.
TGI = {
    "--model-id": flags.DEFAULT_MODEL,  # bigscience/bloom-560m
    "--revision": None,
    "--validation-workers": 2,
    "--sharded": None,
    "--num-shard": None,
    "--quantize": None,
    "--speculate": None,
    "--dtype": "auto",  # unset, which means the same
    "--kv-cache-dtype": None,
    "--trust-remote-code": False,
    "--max-concurrent-requests": 128,
    "--max-best-of": 2,
    "--max-stop-sequences": 4,
    "--max-top-n-tokens": 5,
    "--max-input-tokens": None,
    "--max-input-length": None,
    "--max-total-tokens": None,
    "--waiting-served-ratio": 0.3,
    "--max-batch-prefill-tokens": None,
    "--max-batch-total-tokens": None,
    "--max-waiting-tokens": 20,
    "--max-batch-size": None,
    "--cuda-graphs": None,  # 1,2,4,8,16,32
    "--hostname": "0.0.0.0",
    "--port": 3000,
    "--prometheus-port": 9000,
    "--shard-uds-path": None,  # /tmp/text-generation-server, which other servers want too
    "--master-addr": "localhost",
    "--master-port": 29500,
    "--huggingface-hub-cache": None,
    "--weights-cache-override": None,
    "--disable-custom-kernels": False,
    "--cuda-memory-fraction": 1.0,
    "--rope-scaling": None,
    "--rope-factor": None,
    "--json-output": False,
    "--otlp-endpoint": None,
    "--otlp-service-name": "text-generation-inference.router",
    "--cors-allow-origin": (),
    "--api-key": None,
    "--watermark-gamma": 0.5,  # unset; the same in the shards
    "--watermark-delta": 2.0,  # unset; the same in the shards
    "--ngrok": False,
    "--ngrok-authtoken": None,
    "--ngrok-edge": None,
    "--tokenizer-config-path": None,
    "--disable-grammar-support": False,
    "--env": False,
    "--max-client-batch-size": 4,
    "--lora-adapters": None,
    "--usage-stats": "on",
    "--payload-limit": 2_000_000,
    "--enable-prefill-logprobs": False,
    "--graceful-termination-timeout": 90,
}

# A good value other than the default, what it is read as, and a bad value where there is one.
VALUES: dict[str, tuple[str, object, str]] = {
    "model_id": ("org/name", "org/name", ""),
    "revision": ("v1", "v1", ""),
    "validation_workers": ("3", 3, "-1"),
    "router_workers": ("3", 3, "0"),
    "sharded": ("true", True, "True"),
    "num_shard": ("2", 2, "two"),
    "quantize": ("bitsandbytes-nf4", "bitsandbytes-nf4", "int3"),
    "speculate": ("2", 2, "1.5"),
    "dtype": ("float32", "float32", "float64"),
    "device": ("cpu", "cpu", "tpu"),
    "kv_cache_dtype": ("fp8_e5m2", "fp8_e5m2", "int7"),
    "max_concurrent_requests": ("7", 7, "0"),
    "max_best_of": ("1", 1, "0"),
    "max_stop_sequences": ("0", 0, "-1"),
    "max_top_n_tokens": ("6", 6, "4294967296"),
    "max_input_tokens": ("100", 100, "1e3"),
    "max_input_length": ("100", 100, "x"),
    "max_total_tokens": ("200", 200, "0"),
    "waiting_served_ratio": ("1.5", 1.5, "nan"),
    "max_batch_prefill_tokens": ("64", 64, "0"),
    "max_batch_total_tokens": ("4096", 4096, "99999999999"),
    "max_waiting_tokens": ("5", 5, "x"),
    "max_batch_size": ("9", 9, "x"),
    "cuda_graphs": ("1,2", (1, 2), "1,,2"),
    "hostname": ("::1", "::1", ""),
    "port": ("80", 80, "65536"),
    "prometheus_port": ("9001", 9001, "65536"),
    "shard_uds_path": ("/x", "/x", ""),
    "master_addr": ("host", "host", ""),
    "master_port": ("1", 1, "x"),
    "huggingface_hub_cache": ("/x", "/x", ""),
    "weights_cache_override": ("/x", "/x", ""),
    "cuda_memory_fraction": ("0.5", 0.5, "1.1"),
    "rope_scaling": ("dynamic", "dynamic", "yarn"),
    "rope_factor": ("2", 2.0, "0"),
    "otlp_endpoint": ("http://x:4317", "http://x:4317", "grpc://x"),
    "otlp_service_name": ("x", "x", ""),
    "cors_allow_origin": ("https://a,https://b", ("https://a", "https://b"), ""),
    "api_key": ("secret", "secret", ""),
    "watermark_gamma": ("0.4", 0.4, "2"),
    "watermark_delta": ("1", 1.0, "inf"),
    "ngrok_authtoken": ("x", "x", ""),
    "ngrok_edge": ("x", "x", ""),
    "tokenizer_config_path": ("/x", "/x", ""),
    "max_client_batch_size": ("8", 8, "x"),
    "lora_adapters": ("a,b", "a,b", ""),
    "tool_call_parser": ("hermes", "hermes", "llama"),
    "reasoning_parser": ("none", "none", "no"),
    "usage_stats": ("no-stack", "no-stack", "yes"),
    "payload_limit": ("1", 1, "1MB"),
    "graceful_termination_timeout": ("5", 5, "5s"),
    "log_level": ("warn", "warn", "loud"),
    "compute_type": ("gpu", "gpu", "grün"),
    "prefix_caching": ("0", False, "no"),
    "prefill_chunking": ("0", False, "no"),
    "attention": ("paged", "paged", "eager"),
    "tgi_wiggle_room": ("0.9", 0.9, "2"),
    "hf_api_token": ("x", "x", ""),
    "cuda_visible_devices": ("1", "1", ""),
    "nvidia_visible_devices": ("all", "all", ""),
    "xdg_cache_home": ("/x", "/x", ""),
    "tokenizer_name": ("org/name", "org/name", ""),
    "master_shard_uds_path": ("/x", "/x", ""),
    "max_image_fetch_size": ("5", 5, "5MB"),
    "uds_path": ("/x", "/x", ""),
    "logger_level": ("warning", "warn", "WARN"),
    "extension": (".safetensors", ".safetensors", ".bin"),
    "aip_http_port": ("8081", 8081, ""),
    "aip_predict_route": ("/predict", "/predict", "predict"),
    "aip_health_route": ("/v1/health:x", "/v1/health:x", "/{name}"),
    "git_sha": ("abc", "abc", "ä"),
    "docker_label": ("sha-abc", "sha-abc", "ä"),
    "log_colorize": ("1", True, ""),
    "request_logprobs": ("1", "1", ""),
    "rank": ("1", 1, "x"),
    "world_size": ("2", 2, "x"),
    "use_flash_attention": ("False", "False", ""),
    "exllama_version": ("1", "1", ""),
    "disable_exllama": ("True", "True", ""),
    "use_cutlass_w8a8": ("1", "1", ""),
    "ze_affinity_mask": ("0", "0", ""),
    "file": ("x.txt", "x.txt", ""),
    "threshold": ("3.5", 3.5, "0"),
    "output_dir": ("out", "out", ""),
    "method": ("awq", "awq", "quip"),
    "bits": ("8", 8, "x"),
    "groupsize": ("-1", -1, "0"),
    "percdamp": ("0.1", 0.1, "0"),
    "dataset": ("x.txt", "x.txt", ""),
    "samples": ("3", 3, "0"),
    "sequence_length": ("64", 64, "15"),
    "upload_to_model_id": ("me/mine", "me/mine", ""),
}

SWITCHES = [flag for flag in FLAGS if flag.kind.switch]
VALUED = [flag for flag in FLAGS if not flag.kind.switch]


def by_key(flag: Flag) -> str:
    return flag.key


def command_of(flag: Flag) -> Command:
    return flag.commands[0]


def read(argv: list[str], environ: dict[str, str], command: Command = "launcher") -> tuple[Options, list[str]]:
    """``text-generation-server`` always gets its model."""
    return parse([*(["m"] if PROGRAMS[command].startswith("text-generation-server") else []), *argv], environ, command)


def failure(
    capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str], command: Command = "launcher"
) -> str:
    """What a refused command line prints on standard error."""
    with pytest.raises(SystemExit) as exit:
        read(argv, environ, command)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_every_flag_of_tgi_is_in_the_table_with_its_default() -> None:
    ours = {flag.name: flag.default for flag in FLAGS if flag.name and "launcher" in flag.commands}
    added = {"--device": "auto", "--tool-call-parser": "auto", "--reasoning-parser": "auto", "--router-workers": 1}
    added |= {"--deterministic": False, "--attention": None}
    assert ours == {**TGI, **added, "--max-image-fetch-size": 1 << 30}
    assert {flag.key for flag in VALUED} == VALUES.keys()


def test_the_formats_of_replies_are_the_routers() -> None:
    assert (CALL_PARSERS, REASONING_PARSERS) == (formats.CALL_NAMES, formats.REASONING_NAMES)


def test_every_name_of_tgi_is_known() -> None:
    """Flags are rows of the table; variables are, or it is said why not."""
    variables = {flag.env for flag in FLAGS} | {name for line in VARIABLES.values() for name in line.split()}
    assert set(TGI_NAMES["variables"]) <= variables
    for command in PROGRAMS.keys() & TGI_NAMES.keys():
        flags = {flag.name for flag in FLAGS if command in flag.commands} | {"--help", "--version"}
        if command in ("serve", "download-weights", "quantize"):
            flags |= {f"--no-{name[2:]}" for name in flags} | {"MODEL_ID"}
        assert set(TGI_NAMES[command]) <= flags, command


def test_defaults() -> None:
    assert parse([], {}) == (Options(), [])


@pytest.mark.parametrize("flag", VALUED, ids=by_key)
def test_a_value_is_read_from_both_places_and_the_command_line_wins(
    flag: Flag, capsys: pytest.CaptureFixture[str]
) -> None:
    text, value, _ = VALUES[flag.key]
    ways: list[tuple[list[str], dict[str, str]]] = [([], {flag.env: text})] if flag.env else []
    if flag.only == "place":
        ways += [([text], {})]
    elif flag.name:
        ways += [([flag.name, text], {}), ([f"{flag.name}={text}"], {flag.env: "not even read"})]
    for argv, environ in ways:
        if value in flag.refused or (flag.status == "refused" and value not in flag.neutral):
            error = failure(capsys, argv, environ, command_of(flag))
            assert "is not supported yet" in error
            assert (flag.name if argv else flag.env) in error
            continue
        options, warnings = read(argv, environ, command_of(flag))
        assert getattr(options, flag.key) == value
        assert (len(warnings) == 1 and (flag.name if argv else flag.env) in warnings[0]) == (flag.status == "obsolete")


@pytest.mark.parametrize("flag", [flag for flag in VALUED if VALUES[flag.key][2]], ids=by_key)
def test_a_bad_value_ends_with_usage_and_the_name(flag: Flag, capsys: pytest.CaptureFixture[str]) -> None:
    bad = VALUES[flag.key][2]
    if flag.env:
        error = failure(capsys, [], {flag.env: bad}, command_of(flag))
        assert f"`{flag.env}` (environment)" in error and "usage:" in error
    if flag.name:
        error = failure(capsys, [f"{flag.name}={bad}"], {}, command_of(flag))
        assert f"`{flag.name}`" in error and repr(bad) in error


def test_bytes_that_are_no_text_are_a_bad_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`--model-id`" in failure(capsys, ["--model-id", os.fsdecode(b"/m\xff")], {})
    assert "`API_KEY`" in failure(capsys, [], {"API_KEY": os.fsdecode(b"k\xff")})


@pytest.mark.parametrize("flag", SWITCHES, ids=by_key)
def test_a_switch_stands_alone_and_is_true_or_false_in_the_environment(
    flag: Flag, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: list[tuple[list[str], dict[str, str]]] = [([flag.name], {})]
    if flag.env:
        ways.append(([], {flag.env: "true"}))
        assert parse([], {flag.env: "false"}) == (Options(), [])
        for bad in ("True", "1", "yes", ""):
            assert flag.env in failure(capsys, [], {flag.env: bad})
    for argv, environ in ways:
        if flag.status == "refused":
            assert "is not supported yet" in failure(capsys, argv, environ, command_of(flag))
        else:
            options, warnings = read(argv, environ, command_of(flag))
            assert getattr(options, flag.key) is True
            assert bool(warnings) == (flag.status == "obsolete")


def test_each_command_has_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tokenizer-name" in failure(capsys, ["--tokenizer-name", "x"], {})
    assert "--model-id" in failure(capsys, ["--model-id", "x"], {}, "router")
    assert "--port" in failure(capsys, ["--port", "1"], {}, "serve")
    assert read([], {"TOKENIZER_NAME": "x"}) == (Options(), [])
    with pytest.raises(SystemExit):
        parse([], {}, "serve")
    assert "MODEL_ID" in capsys.readouterr().err
    assert parse(["org/name"], {"MODEL_ID": "other"}, "serve")[0].model_id == "org/name"


def test_switches_of_the_server_turn_off_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    for command, name in (("serve", "sharded"), ("serve", "json-output"), ("download-weights", "auto-convert")):
        options, warnings = read([f"--no-{name}"], {"JSON_OUTPUT": "true"}, command)  # type: ignore[arg-type]  # literals
        assert getattr(options, name.replace("-", "_")) is False and not warnings
    assert "--no-json-output" in failure(capsys, ["--no-json-output"], {})


def test_a_port_of_vertex_that_is_none_is_passed_over() -> None:
    assert check(read([], {"AIP_HTTP_PORT": "8081", "PORT": "80"})[0]).port == 8081
    assert check(read(["--port", "81"], {"AIP_HTTP_PORT": "8081"}, "router")[0]).port == 8081
    for bad in ("", "http", "65536"):
        options, warnings = read([], {"AIP_HTTP_PORT": bad, "PORT": "80"})
        assert check(options).port == 80
        assert len(warnings) == 1 and "AIP_HTTP_PORT" in warnings[0]


@pytest.mark.parametrize("argv", [["--cuda-graphs", "0"], ["--num-shard=1"], ["--sharded", "false"], ["--speculate=0"]])
def test_asking_for_nothing_is_not_refused(argv: list[str]) -> None:
    assert parse(argv, {})[1] == []


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["-p", "81"], "port", 81),  # TGI gives -p to the metrics port as well; the first wins there too
        (["-g", "3"], "graceful_termination_timeout", 3),
        (["-e"], "env", True),
        (["--port", "1", "--port", "2"], "port", 2),
        (
            ["--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b"],
            "cors_allow_origin",
            ("https://a", "https://b"),
        ),
    ],
)
def test_forms_of_the_command_line(argv: list[str], key: str, value: object) -> None:
    assert getattr(parse(argv, {})[0], key) == value


def test_unknown_and_abbreviated_flags_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model" in failure(capsys, ["--model", "x"], {})
    assert "--nothing" in failure(capsys, ["--nothing"], {})


def test_hostname_variable_that_shells_set_is_passed_over() -> None:
    assert parse([], {"HOSTNAME": socket.gethostname()})[0].hostname == "0.0.0.0"
    assert parse(["--hostname", socket.gethostname()], {})[0].hostname == socket.gethostname()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            Options(max_input_tokens=1, max_input_length=2),
            "Both `max_input_tokens` (1) and `max_input_length` (2) are set. Please define only `max_input_tokens` as "
            "`max_input_length is deprecated for naming consistency.",
        ),
        (Options(validation_workers=0), "`validation_workers` must be > 0"),
        (Options(max_batch_size=0), "`max_batch_size` must be > 0"),
        (
            Options(max_input_length=8, max_total_tokens=8),
            "`max_input_tokens`(8) must be < `max_total_tokens`(8)",
        ),
        (
            Options(max_total_tokens=9, max_batch_total_tokens=8),
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (
            Options(max_batch_prefill_tokens=9, max_batch_total_tokens=8),
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
    ],
)
def test_contradictions_are_told_in_the_words_of_tgi(options: Options, text: str) -> None:
    with pytest.raises(ArgumentValidation) as error:
        check(options)
    assert str(error.value) == text


def test_old_name_becomes_the_new_one() -> None:
    assert check(Options(max_input_length=5)) == Options(max_input_tokens=5)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command, program in PROGRAMS.items():
        for option in ("--help", "-h", "--version", "-V"):
            with pytest.raises(SystemExit) as exit:
                parse([option], {}, command)
            assert exit.value.code == 0
            out = capsys.readouterr().out
            assert program in out
            if "h" in option:
                flags = [flag for flag in FLAGS if command in flag.commands and flag.key != "model_id"]
                assert all((flag.name or flag.env) in out for flag in flags)


def test_document_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "flags.md"
    made = subprocess.run([sys.executable, "-m", "tgi.launcher.flags"], capture_output=True, text=True, check=True)
    assert page.read_text() == made.stdout, "run: python -m tgi.launcher.flags > docs/flags.md"
