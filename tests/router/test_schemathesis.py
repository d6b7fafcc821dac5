"""schemathesis makes requests of the OpenAPI document, good ones and bad ones: no answer may be one that it lacks.

The engine behind is a fake: what is tried is everything in front of it.
"""

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi

from tests.router.serving import Router, settings
from tgi.router.openapi import document

CHECKS = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.ignored_auth,
]
"""Not among them: that good data is accepted and bad data refused. Types can't say which model, which room and which
tokens there are, and unknown fields are ignored, as TGI does."""


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"))) as router:
        yield router


api = schemathesis.openapi.from_dict(json.loads(document()))


@api.parametrize()
@hypothesis_settings(
    max_examples=15,
    deadline=None,
    derandomize=True,  # the same requests at every run: a failure is one of the change that is tested
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_documented(case: schemathesis.Case, router: Router) -> None:
    case.call_and_validate(base_url=router.url, checks=CHECKS, timeout=20)
