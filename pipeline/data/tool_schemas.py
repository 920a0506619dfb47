"""Writes the functions that a model can call as TypeScript declarations, as openai-harmony does.

The tests compare these texts with those of the package openai-harmony, which also has some peculiar output. For
example, the description of an object in a property is written twice, and an `anyOf` becomes `any`. The model sees this
output in the engines, so training uses it unchanged.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from pipeline.data.conversations import FunctionSchema

_TYPES = {"number": "number", "integer": "number", "boolean": "boolean"}
_EXPONENT = re.compile(r"(\d)(?:\.(\d+))?e([+-]\d+)")


def declare_functions(schemas: Sequence[FunctionSchema]) -> str:
    """Return the section `# Tools` of the developer message. Each schema has a name, and may have parameters."""
    lines = ["# Tools\n", "## functions\n", "namespace functions {\n"]
    for schema in schemas:
        lines += [f"// {line}" for line in _lines(schema["description"])]
        parameters = schema.get("parameters")
        argument = "" if parameters is None else f"_: {_type_of(parameters, '')}"
        lines.append(f"type {schema['name']} = ({argument}) => any;\n")
    return "\n".join([*lines, "} // namespace functions"])


def _type_of(schema: object, indent: str) -> str:
    """Return the TypeScript type of a JSON schema. `indent` is put before each further line."""
    if not isinstance(schema, dict):
        return "any"
    variants, kind = schema.get("oneOf"), schema.get("type")
    if isinstance(variants, list):
        return "".join(f"\n{indent} | {_variant(variant, f'{indent}   ')}" for variant in variants)
    if isinstance(kind, list) and any(isinstance(name, str) for name in kind):
        return " | ".join("number" if name == "integer" else name for name in kind if isinstance(name, str))
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        names = schema["enum"] if isinstance(schema.get("enum"), list) else []
        return " | ".join(f'"{name}"' for name in names if isinstance(name, str)) or "string"
    if kind == "array":
        return f"{_type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return _TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def _variant(schema: object, indent: str) -> str:
    """Return the text of one alternative of a `oneOf`, with its comment at the end.

    The `oneOf` is nested: it is not itself the schema of a property.
    """
    if not isinstance(schema, dict):
        return "any"
    text = _or_null(schema, _type_of(schema, indent))
    comments = [schema["description"]] if isinstance(schema.get("description"), str) else []
    if "default" in schema:
        default, is_enum = schema["default"], _is_enum(schema)
        comments.append(f"default: {_json(default) if is_enum else _default(default, is_enum=False)}")
    return f"{text} // {' '.join(comments)}" if comments else text


def _object(schema: Mapping[str, object], indent: str) -> str:
    description = schema.get("description")
    opening = f"{indent}// {description}\n" if isinstance(description, str) else ""
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    inner = properties.items() if isinstance(properties, dict) else ()
    parts = [_property(f"{name}{'' if name in needed else '?'}", value, indent) for name, value in inner]
    return f"{opening}{{\n{''.join(parts)}{indent}}}"


def _property(name: str, value: object, indent: str) -> str:
    """Return one property of an object, with the comments above it. It ends with a line break."""
    schema: Mapping[str, object] = value if isinstance(value, dict) else {}
    above = _comments_above(schema, indent)
    if isinstance(schema.get("oneOf"), list):
        return above + _alternatives(name, schema, indent)
    text = f"{above}{indent}{name}: {_or_null(schema, _type_of(value, f'{indent}    '))},"
    if "oneOf" not in schema and "default" in schema:
        text += f" // default: {_default(schema['default'], is_enum=_is_enum(schema))}"
    return f"{text}\n"


def _comments_above(schema: Mapping[str, object], indent: str) -> str:
    title, description, examples = (schema.get(key) for key in ("title", "description", "examples"))
    lines = [f"// {title}", "//"] if isinstance(title, str) else []
    if "oneOf" not in schema and isinstance(description, str):
        lines.append(f"// {description}")
    if isinstance(examples, list) and examples:
        lines += ["// Examples:", *(f'// - "{example}"' for example in examples if isinstance(example, str))]
    return "".join(f"{indent}{line}\n" for line in lines)


def _alternatives(name: str, schema: Mapping[str, object], indent: str) -> str:
    """Return a property with a `oneOf`: one alternative on each line."""
    variants = cast(list[object], schema["oneOf"])
    own = schema.get("description") if isinstance(schema.get("description"), str) else None
    firsts = variants[0].get("description") if variants and isinstance(variants[0], dict) else None
    is_above = own is not None and own != firsts
    lines = [f"// {own}"] if is_above else []
    if "default" in schema:
        lines.append(f"// default: {_default(schema['default'], is_enum=_is_enum(schema))}")
    lines.append(f"{name}:")
    for i, variant in enumerate(variants):
        inner: Mapping[str, object] = variant if isinstance(variant, dict) else {}
        described = inner.get("description")
        shows = isinstance(described, str) and described != own and not (i == 0 and is_above)
        comments = [described] if shows else []
        if "default" in inner:
            comments.append(f"default: {_default(inner['default'], is_enum=_is_enum(inner))}")
        end = f" // {' '.join(map(str, comments))}" if comments else ""
        lines.append(f" | {_or_null(inner, _type_of(variant, f'{indent}   '))}{end}")
    return "".join(f"{indent}{line}\n" for line in [*lines, ","])


def _or_null(schema: Mapping[str, object], text: str) -> str:
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def _is_enum(schema: Mapping[str, object]) -> bool:
    return isinstance(schema.get("enum"), list) and bool(schema["enum"])


def _default(value: object, *, is_enum: bool) -> str:
    if isinstance(value, str):
        return value if is_enum else f'"{value}"'
    return _json(value)


def _json(value: object) -> str:
    """Write JSON as Rust's serde_json does: without spaces, and with floats in Rust's form."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_json, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return _rust_float(text) if isinstance(value, float) else text


def _rust_float(text: str) -> str:
    """Convert a float as Python writes it: 1e+20 to 1e20, 1e-07 to 1e-7, 1e-05 to 0.00001."""
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    found = _EXPONENT.fullmatch(text)
    if found is None:
        return sign + text
    first, rest, exponent = found[1], found[2] or "", int(found[3])
    if exponent == -5:
        return f"{sign}0.0000{first}{rest}"
    return f"{sign}{first}{f'.{rest}' if rest else ''}e{exponent}"


def _lines(text: str) -> list[str]:
    """Split a text at line feeds, as Rust does. A carriage return before a line feed belongs to the line break."""
    lines = text.split("\n")
    endings = [line.removesuffix("\r") for line in lines[:-1]]
    return [*endings, lines[-1]] if lines[-1] else endings
