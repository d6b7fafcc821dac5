"""``--usage-stats`` is accepted and nothing is ever sent: the package has no address to send to."""

import ast
import re
from pathlib import Path

from tests.test_imports import imported

PACKAGE = Path(__file__).parents[1] / "tgi"
KNOWN = {
    "http://host:4317",  # an example of --otlp-endpoint
    "http://localhost:4317",
    "https://www.apache.org/licenses/LICENSE-2.0",  # the licence, in the OpenAPI document
}
CLIENTS = {"aiohttp", "http.client", "httpx", "requests", "urllib.request", "urllib3"}


def test_no_address_but_examples_is_in_the_package() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html", ".json", ".cpp")]
    assert files
    found = {url for path in files for url in re.findall(r"https?://[\w-][^\s\"'`<>)]*", path.read_text())}
    assert found <= KNOWN


def test_only_downloads_and_the_benchmark_have_an_http_client() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in ("launcher", "benchmark"):
            modules = set(imported(ast.parse(path.read_text())))
            assert not {name for name in modules for client in CLIENTS if f"{name}.".startswith(f"{client}.")}, path
