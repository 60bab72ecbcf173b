"""Objectives of pre-training: what a model is given of a text, and what it has to say of it.

Span corruption, the paper's, has a file of its own.
"""

from typing import Annotated

from pydantic import BeforeValidator

from switchcli.data.span_corruption import SpanCorruption


def _span_corruption_unless_said(value: object) -> object:
    return {"kind": "span_corruption", **value} if isinstance(value, dict) else value


ObjectiveSpec = Annotated[SpanCorruption, BeforeValidator(_span_corruption_unless_said)]
