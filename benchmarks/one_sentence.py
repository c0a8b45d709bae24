"""A metric of responses: the share that is one sentence, and comes to its end."""

import re
from statistics import mean

from distill.evaluation.metrics import register_metric

_BETWEEN = re.compile(r"[.!?][\"')]*\s+\S|\n")  # two sentences, or two lines


@register_metric("one_sentence")
def one_sentence(responses):
    texts = [each.text.strip() if each.stopped else "" for each in responses]
    return {"share": mean(bool(text) and not _BETWEEN.search(text) for text in texts)}
