"""A form that a reply must have: a JSON schema, or a pydantic model, and what a reply says in it as typed columns."""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs

from posttrain.synth.ledger.replies import calls_of
from posttrain.synth.pipelines.rows import Reply
from posttrain.synth.steps.verdicts import THOUGHTS

NAME = "reply"
FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class Unfit(Exception):
    """A reply does not fit the form; the message says why, in words for the model and for people."""


@attrs.frozen(slots=False)
class Form:
    """What a reply must look like."""

    given: Any
    """A JSON schema of an object, or a pydantic model."""

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema."""
        model: Any = self.given
        return dict(model if isinstance(model, Mapping) else model.model_json_schema())

    @property
    def columns(self) -> list[str]:
        """Names of what a reply says."""
        return list(self.schema.get("properties") or {})

    def problem(self) -> str | None:
        """Return why this is no form for replies; None if it is one."""
        if isinstance(self.given, type):
            if not hasattr(self.given, "model_json_schema"):
                return f"{self.given.__name__} is no pydantic model"
        elif not isinstance(self.given, Mapping):
            return f"is a JSON schema or a pydantic model, not {type(self.given).__name__}"
        else:
            import importlib.util

            if importlib.util.find_spec("jsonschema") is None:
                return "a JSON schema needs the package jsonschema: pip install 'posttrain[schema]'"
            from posttrain.errors import DataError
            from posttrain.synth.steps.verify import schema_of

            try:
                schema_of(dict(self.given))
            except DataError as error:
                return str(error)
        return None if self.columns else "describes no object with properties, which become the columns of a row"

    @property
    def sent(self) -> dict[str, Any]:
        """What a request holds to ask for the form; `strict` where the schema is as strict as providers ask for."""
        wanted = {"name": NAME, "strict": is_strict(self.schema), "schema": self.schema}
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}

    def read(self, reply: Reply) -> dict[str, Any]:
        """Return what a reply says, column by column.

        Raises:
            Unfit: it does not fit the form.
        """
        text = json_text(reply)
        if text is None:
            raise Unfit(reply.trouble)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"it is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise Unfit(f"it is {type(value).__name__}, not an object")
        return self._typed(value) if isinstance(self.given, type) else self._valid(value)

    def _typed(self, value: dict[str, Any]) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            # From JSON, so that strict fields take what JSON can say of them.
            return dict(self.given.model_validate_json(json.dumps(value)).model_dump(mode="json"))
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5])
            raise Unfit(said) from None

    def _valid(self, value: dict[str, Any]) -> dict[str, Any]:
        from jsonschema.validators import validator_for

        wrong = list(validator_for(self.schema)(self.schema).iter_errors(value))
        if wrong:
            raise Unfit("; ".join(f"{'.'.join(map(str, e.path)) or 'it'}: {e.message[:200]}" for e in wrong[:5]))
        return {name: value.get(name) for name in self.columns} | value


def json_text(reply: Reply) -> str | None:
    """Return the JSON of a reply: its text without thoughts and code fences, or the arguments of the tool it calls."""
    for function in calls_of(reply.choice.get("message") or {}):
        if function.get("name") == NAME:
            arguments = function.get("arguments")
            return arguments if isinstance(arguments, str) else json.dumps(arguments)
    if reply.text is None:
        return None
    text = THOUGHTS.sub("", reply.text).strip()
    fenced = FENCE.search(text)
    return fenced[1] if fenced else text


def is_strict(schema: Any) -> bool:
    """Whether every object inside a schema names all its properties as required and allows no others."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        named = set(schema.get("properties") or {})
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != named:
            return False
    inside = [value for name, value in schema.items() if name not in ("properties", "enum", "const", "default")]
    return is_strict([*inside, *(schema.get("properties") or {}).values()])
