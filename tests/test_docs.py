"""The pages keep their word: the tests that they name exist, links lead somewhere, made tables are up to date."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.clients.environments import table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPATIBILITY = ROOT / "docs" / "compatibility.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def section(heading: str) -> str:
    """Of the page on compatibility."""
    _, found, rest = COMPATIBILITY.read_text().partition(f"\n## {heading}\n")
    assert found
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    for path, name in set(TEST.findall(page.read_text())):
        functions = {
            node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"


def test_each_of_tgi_s_known_mistakes_has_a_decision_and_a_test() -> None:
    told = section("TGI's known mistakes")
    rows = re.findall(r"^\| ([\d, ]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", told, re.MULTILINE)
    assert all(TEST.search(tests) for *_, tests in rows)
    numbers = [int(number) for numbers, *_ in rows for number in numbers.split(",")]
    assert len(set(numbers)) == len(numbers)
    assert set(range(20, 48)) <= set(numbers)


def test_the_tables_of_what_there_is_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compatibility", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_client_that_is_tried_is_told() -> None:
    told = section("Clients")
    for client in table():
        name, _, line = client.name.rpartition("-")
        assert f"| `{name if line.isdigit() else client.name}`" in told
        for version in re.findall(
            rf"{client.name}(?:\[\w+\])?==([\d.]+)", " ".join((*client.requires, *client.no_deps))
        ):
            assert f"| {version} |" in told, client.name


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, place = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not place or place in anchors(found), target


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
