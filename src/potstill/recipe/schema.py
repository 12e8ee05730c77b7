"""The JSON Schema of a recipe (draft 2020-12), made from the same signatures that check it. For editors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from potstill.core.catalog import keywords, parts
from potstill.recipe.calls import OPTIONAL, SUPPLIED, choices
from potstill.recipe.elicitation import FILES
from potstill.recipe.nested import NAMELESS
from potstill.recipe.rounds import Rounds
from potstill.recipe.signature import in_full, json_schema, knobs, parts_in, teachers_in

TEXT = {"type": "string"}


def schema() -> dict[str, Any]:
    """Every section with its knobs, their types, defaults and first words of documentation."""
    from potstill.loops.fit import fit

    training = _knobs(fit, supplied=SUPPLIED["fit"])
    taught = {"fit": {"$ref": "#/$defs/fit"}, "weights": TEXT, "data": {"type": "object"}, "remember": TEXT}
    terms = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/term"}}
    stage = {
        "objective": terms,
        "fit": {"$ref": "#/$defs/fit"},
        "train": {"type": "array", "items": TEXT},
        "data": {"type": "object"},
        "source": {"$ref": "#/properties/source"},
    }
    trained = {
        "anyOf": [
            {"oneOf": [{"required": ["objective", "fit"]}, {"required": ["stages"]}]},
            {"required": ["arms"]},
        ]
    }
    arm = {key: {"$ref": f"#/properties/{key}"} for key in ("source", "objective", "fit", "stages")}
    arm |= {"data": {"type": "object"}, "student": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Potstill recipe",
        "type": "object",
        "properties": {
            "name": TEXT,
            "about": TEXT,
            "cite": TEXT,
            "data": _one_of(choices("data"), supplied=SUPPLIED["data"], optional=OPTIONAL["data"]),
            "teacher": {
                "anyOf": [
                    _one_of(choices("teacher"), optional=OPTIONAL["teacher"], more=taught),
                    {"$ref": "#/$defs/writer"},
                ]
            },
            "student": _one_of(choices("student"), optional=OPTIONAL["student"]),
            "source": _with_schedules(_one_of(choices("source"), supplied=SUPPLIED["source"])),
            "scheme": _one_of(choices("scheme"), supplied=SUPPLIED["scheme"]),
            "objective": terms,
            "fit": {"$ref": "#/$defs/fit"},
            "stages": {"type": "array", "minItems": 1, "items": _object(stage, required=["objective", "fit"])},
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True, "default": [0]},
            "arms": {"type": "object", "minProperties": 1, "additionalProperties": _object(arm, required=[])},
            "elicit": _elicit(),
            "rounds": {"anyOf": [{"type": "integer", "minimum": 1}, _knobs(Rounds, supplied=frozenset())]},
            "task": _one_of(
                parts("task"),
                more={"max_tokens": {"type": "integer", "minimum": 1}, "limit": {"type": ["integer", "null"]}},
            ),
            "baseline": {"type": ["object", "null"], "default": {}},
            "out": TEXT,
        },
        "anyOf": [
            {"required": ["data", "student"], **trained},
            {"required": ["elicit", "student"], **trained},
            {"required": ["elicit"], "not": {"required": ["student"]}},
        ],
        "dependentSchemas": {
            "arms": {"properties": {"baseline": {"type": "null"}}},
            "rounds": {"required": ["elicit", "student", "task"], "properties": {"baseline": {"type": "null"}}},
        },
        "additionalProperties": False,
        "$defs": {
            "fit": training,
            "term": _terms(),
            "writer": _one_of(parts("writer"), supplied=SUPPLIED["writer"]),
            "task": _one_of(parts("task")),
            "step": _one_of(parts("elicitor")),
        },
    }


def _elicit() -> dict[str, Any]:
    from potstill.data.exports import export_rows

    export = _knobs(export_rows, supplied=frozenset({"rows", "path"}))
    export["properties"] |= {"name": TEXT, "file": {"enum": list(FILES)}}
    count = {"type": ["integer", "null"], "minimum": 1}
    return _object(
        {
            "seeds": _one_of(choices("seeds")),
            "teacher": {"$ref": "#/$defs/writer"},
            "steps": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}},
            "until": count,
            "limit": count,
            "budget": {"type": "number", "minimum": 0},
            "store": TEXT,
            "export": {"anyOf": [export, {"type": "array", "minItems": 1, "items": export}]},
            "licences": {"type": "object", "additionalProperties": TEXT},
        },
        required=["seeds", "steps"],
    )


def _terms() -> dict[str, Any]:
    schedules = _one_of(parts("schedule"))
    weigh = {"anyOf": [{"enum": list(parts("weight"))}, {"type": "string", "pattern": ":"}]}
    pairs = {"type": "object", "additionalProperties": TEXT, "not": {"required": ["use"]}}
    layers = _one_of(parts("layers"), supplied=SUPPLIED["layers"])
    more = {
        "weight": {"oneOf": [{"type": "number"}, schedules], "default": 1.0},
        "at": {"oneOf": [{"type": "array", "items": TEXT}, pairs, layers]},
        "over": {**TEXT, "default": "mask"},
        "only": {"type": "object", "additionalProperties": {"type": "integer"}},
        "weigh": weigh,
        "select": _object({"by": weigh, "fraction": {"type": "number"}}, required=["by", "fraction"]),
    }
    return _with_schedules(_one_of(parts("loss"), more=more), but=frozenset(more))


def _with_schedules(found: dict[str, Any], *, but: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The same where every number may also be a schedule."""
    schedules = _one_of(parts("schedule"))
    for alternative in found["oneOf"]:
        for name, knob in alternative["properties"].items():
            if name not in but and knob.get("type") == "number":
                alternative["properties"][name] = {"oneOf": [knob, schedules], "default": knob.get("default")}
    return found


def _one_of(
    known: Mapping[str, Callable[..., Any]],
    *,
    supplied: frozenset[str] = frozenset(),
    optional: frozenset[str] = frozenset(),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One alternative per part, told apart by `use`; the last one is any `package.module:name`."""
    alternatives = []
    for name, part in known.items():
        described = _knobs(part, supplied=supplied, optional=optional)
        own = described["properties"]
        besides = {key: value for key, value in (more or {}).items() if key not in own}
        described["properties"] = {"use": {"const": name}, **own, **besides}
        described["required"] = ["use", *described["required"]]
        alternatives.append({"title": name, "description": summary(part), **described})
    outside = {"type": "object", "properties": {"use": {"type": "string", "pattern": ":"}}, "required": ["use"]}
    return {"type": "object", "oneOf": [*alternatives, outside], "discriminator": {"propertyName": "use"}}


def _knobs(
    part: Callable[..., Any], *, supplied: frozenset[str], optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    known = {name: annotation for name, annotation in knobs(part).items() if name not in supplied}
    preset = in_full(part, {})
    properties = {
        name: {**json_schema(annotation), **({"default": preset[name]} if name in preset else {})}
        for name, annotation in known.items()
    }
    for name, several in teachers_in(part).items():
        if name not in supplied:
            teacher = {"$ref": "#/properties/teacher"}
            properties[name] = {"type": "array", "items": teacher} if several else teacher
    for name, (kind, shape) in parts_in(part).items():
        one = (
            {"$ref": f"#/$defs/{kind}"}
            if kind != "writer"
            else {"anyOf": [{"$ref": "#/$defs/writer"}, {"enum": list(NAMELESS)}]}
        )
        several = {"list": {"type": "array", "items": one}, "mapping": {"type": "object", "additionalProperties": one}}
        properties[name] = several.get(shape, one)
        optional |= {name} & NAMELESS.keys()
    needed = [
        name for name in properties if keywords(part)[name].default is inspect.Parameter.empty and name not in optional
    ]
    return _object(properties, required=needed)


def _object(properties: Mapping[str, Any], *, required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def summary(part: Callable[..., Any]) -> str:
    """The first line of a part's documentation."""
    return (inspect.getdoc(part) or "").partition("\n")[0]
