"""Functions are declared as openai-harmony declares them.

The fixed texts were compared with openai-harmony 0.0.8. If its vocabulary is here, random schemas are compared as well.
"""

import os
from random import Random
from typing import Any

import pytest

from pipeline.data.tool_schemas import declare_functions

WORDS = ["x", "a b", "é", 'q"uo', "multi\nline", " lead", "null here", "数字", "\r\n", "", "a\\b"]
NUMBERS = [1.0, 0.1, 1e20, 1e16, 1e15, 1e-5, 1.5e-5, 1e-6, -2.5e-9, -1e-5, 3.14e22, 5e-324, -0.0, 12345678901234567.0]
KINDS: list[Any] = [
    *("object", "object", "string", "string", "number", "integer", "boolean", "array", "null", "foo"),
    *(["string", "null"], ["integer"], [], ["object", 3], [3], 7, None),
]


def declared(parameters: Any, description: str = "d") -> str:
    text = declare_functions([{"name": "f", "description": description, "parameters": parameters}])
    opening, end = "# Tools\n\n## functions\n\nnamespace functions {\n\n", "\n\n} // namespace functions"
    assert text.startswith(opening) and text.endswith(end)
    return text.removeprefix(opening).removesuffix(end)


def of_properties(**properties: Any) -> str:
    text = declared({"type": "object", "properties": properties, "required": ["needed"]})
    return text.removeprefix("// d\ntype f = (_: {\n").removesuffix("\n}) => any;")


TYPES: dict[str, tuple[Any, str]] = {
    "text": ({"type": "string"}, "string"),
    "choice": ({"type": "string", "enum": ["u", "v"]}, '"u" | "v"'),
    "number": ({"type": "integer"}, "number"),
    "several types": ({"type": ["integer", "null"]}, "number | null"),
    "nullable": ({"type": "number", "nullable": True}, "number | null"),
    "list": ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, "number[][]"),
    "list of anything": ({"type": "array"}, "Array<any>"),
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "any"),
    "reference": ({"$ref": "#/$defs/a"}, "any"),
}


@pytest.mark.parametrize(("schema", "written"), TYPES.values(), ids=TYPES.keys())
def test_a_property_has_its_type(schema: Any, written: str) -> None:
    assert of_properties(a=schema) == f"a?: {written},"


def test_a_required_property_has_no_question_mark() -> None:
    assert of_properties(needed={"type": "string"}) == "needed: string,"


@pytest.mark.parametrize(
    ("value", "written"),
    [("x", '"x"'), (3, "3"), (1.0, "1.0"), (1e20, "1e20"), (1e-7, "1e-7"), (1e-5, "0.00001"), (None, "null")],
)
def test_a_default_is_a_comment_behind_the_property(value: Any, written: str) -> None:
    assert of_properties(a={"type": "number", "default": value}) == f"a?: number, // default: {written}"


def test_descriptions_titles_and_examples_are_comments_above_the_property() -> None:
    schema = {"type": "string", "title": "T", "description": "D", "examples": ["p", 3]}
    assert of_properties(a=schema) == '// T\n//\n// D\n// Examples:\n// - "p"\na?: string,'


def test_alternatives_are_one_on_each_line() -> None:
    variants = [{"type": "string", "description": "a name"}, {"type": "integer", "default": 2}]
    assert of_properties(a={"oneOf": variants, "description": "A", "default": "q"}) == (
        '// A\n// default: "q"\na?:\n | string\n | number // default: 2\n,'
    )


def test_objects_in_objects_are_indented() -> None:
    inner = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    assert of_properties(a=inner) == "a?: {\n    x: string,\n    },"


def test_a_function_without_parameters_takes_nothing() -> None:
    assert declared(None) == "// d\ntype f = () => any;\n".rstrip("\n")


def test_each_line_of_a_description_is_a_comment() -> None:
    assert declared(None, "one\r\n\ntwo\n").splitlines()[:3] == ["// one", "// ", "// two"]


def random_schema(random: Random, depth: int = 0) -> dict[str, Any]:
    def inner() -> dict[str, Any]:
        return random_schema(random, depth + 1) if depth < 4 else {"type": "string"}

    schema: dict[str, Any] = {"type": random.choice(KINDS)} if random.random() < 0.85 else {}
    choices: dict[str, tuple[float, Any]] = {
        "oneOf": (0.15, lambda: [inner() for _ in range(random.randrange(4))]),
        "properties": (0.5, lambda: {random.choice("abé"): inner() for _ in range(random.randrange(4))}),
        "required": (0.4, lambda: random.choice([["a"], ["b", "é"], [1], "a", None])),
        "items": (0.35, lambda: random.choice([inner(), True, None])),
        "title": (0.3, lambda: random.choice([*WORDS, 3, None])),
        "description": (0.3, lambda: random.choice([*WORDS, 3, None])),
        "examples": (0.2, lambda: random.choice([[], ["p", 3], "x", None])),
        "default": (0.3, lambda: random.choice([*WORDS, *NUMBERS, 10**18, None, True, [1, {"a b": None}], {}])),
        "enum": (0.25, lambda: random.choice([[], ["u", "v w"], [1], ["u", 1, None], "x", None])),
        "nullable": (0.2, lambda: random.choice([True, False, 1, None])),
    }
    return schema | {key: make() for key, (share, make) in choices.items() if random.random() < share}


@pytest.mark.skipif(
    "TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs shared test data: openai-harmony's vocabulary"
)
def test_random_schemas_are_written_as_openai_harmony_writes_them() -> None:
    import openai_harmony as harmony

    encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    random = Random(0)
    for _ in range(1500):
        schema, description = random_schema(random), random.choice([*WORDS, "two\nlines\n"])
        tool = harmony.ToolDescription.new("f", description, parameters=schema)
        content = harmony.DeveloperContent.new().with_function_tools([tool])
        message = harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)
        theirs = encoding.decode(encoding.render_conversation(harmony.Conversation.from_messages([message])))
        ours = declare_functions([{"name": "f", "description": description, "parameters": schema}])
        assert theirs == f"<|start|>developer<|message|>{ours}<|end|>", schema
