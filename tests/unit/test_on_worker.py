"""What Ray Train's JSON lines have of a worker."""

import json
import logging

from ray._common.formatters import JSONFormatter

from ray_prefopt.training.on_worker import Place


def test_every_line_says_run_rank_and_step() -> None:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Kept()
    handler.setFormatter(JSONFormatter())
    place = Place("first", 3)
    handler.addFilter(place)
    logger = logging.getLogger("tests.somebody_else")
    logger.addHandler(handler)
    logger.warning("before")
    place.at(7)
    logger.error("it is %s", "late")
    logger.removeHandler(handler)
    found = [json.loads(line) for line in lines]
    assert [{key: line[key] for key in ("message", "run", "rank", "step")} for line in found] == [
        {"message": "before", "run": "first", "rank": 3, "step": 0},
        {"message": "it is late", "run": "first", "rank": 3, "step": 7},
    ]
