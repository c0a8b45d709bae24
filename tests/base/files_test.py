"""JSON that every reader takes."""

import json
import math

from distill.base.files import to_json


def test_numbers_that_json_does_not_know_are_null():
    value = {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": None, "e": "nan"}}
    expected = {"a": [None, 1.5, [None]], "b": {"c": None, "d": None, "e": "nan"}}
    assert json.loads(to_json(value, indent=2)) == expected
