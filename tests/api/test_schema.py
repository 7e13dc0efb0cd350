"""Property tests of the server against its OpenAPI document, with valid and invalid requests."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from runtime.api.options import Limits
from runtime.api.service import Service
from tests.helpers.served import ENDPOINTS, api_of, send

pytestmark = pytest.mark.slow  # thousands of generated requests

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return send(api_of(service), "/openapi.json").json()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ENDPOINTS)
def test_answers_are_as_documented(service: Service, path: str, mode: GenerationMode):
    schema = schemathesis.openapi.from_asgi("/openapi.json", api_of(service, Limits(tokens=2000)))

    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def holds(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    holds()


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_state_is_as_documented(service: Service, path: str):
    schema = schemathesis.openapi.from_asgi("/openapi.json", api_of(service))
    schema[path]["GET"].Case().call_and_validate(checks=CHECKS)


def test_the_document_is_complete(service: Service, document: dict[str, Any]):
    """Each operation has texts and error responses, and its example request succeeds."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"] and operation["description"], (method, path)
            assert "200" in operation["responses"]
            if method == "post":
                assert set(operation["responses"]) >= {"400", "401", "404", "408", "413", "422", "429", "500", "503"}
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                (example,) = document["components"]["schemas"][reference.rpartition("/")[2]]["examples"]
                assert send(api_of(service), path, example).status_code == 200, path


def test_the_key_is_in_the_document(service: Service, document: dict[str, Any]):
    key = "correct-horse-battery"
    keyed = send(api_of(service, key=key), "/openapi.json", headers={"authorization": f"Bearer {key}"})
    assert "security" not in document and key not in keyed.text
    assert set(keyed.json()["components"]["securitySchemes"]) == {"bearer", "basic"}
    assert keyed.json()["security"] == [{"bearer": []}, {"basic": []}]
