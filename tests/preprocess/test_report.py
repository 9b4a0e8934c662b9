"""The closing table, the limit on refusals, the exit code, and the summary for machines."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from preprocess.events import FirstSample, NodeExcluded
from preprocess.messages import Loaded
from preprocess.report import EARLIER, JobReport, Limit, remedy
from preprocess.summary import library_versions, summary_json
from preprocess.tally import Tally
from preprocess.timeline import WorkerSeconds
from shared.cache.ledger import Refusal
from shared.errors import InputError

WORKERS = {
    "a": WorkerSeconds(alive=100, text=10, vae=80, wait=95, commit=3),
    "b": WorkerSeconds(alive=100, text=10, vae=90, wait=0, commit=3),
}


def refusal(reason: str, source: str = "a.mp4", sample: str | None = "s") -> Refusal:
    """Returns a row of the ledger."""
    return Refusal(source=source, sample=sample, reason=reason, detail="found that")


def report(*, encoded: int = 90, refused: int = 10, pending: int = 0, before: int = 0, **others: Any) -> JobReport:
    """Returns the report of a job."""
    tally = Tally(num_encoded=encoded, num_bytes=1234, num_retries=3, num_tokens=1000)
    tally.refuse([refusal("not_decodable")] * refused)
    if pending:
        tally.pending["SlowDown"] = pending
    return JobReport(num_rows=101, num_clips=100, tally=tally, num_committed_before=before, **others)


def table(made: JobReport) -> dict[str, str]:
    """Returns the closing table's names and values."""
    rows = (line.rsplit(maxsplit=1) for line in made.table().split("\n\n")[0].splitlines())
    return {name.strip(): value for name, value in rows}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0", Limit(number=0)),
        ("100", Limit(number=100)),
        ("1%", Limit(part=Fraction(1, 100))),
        ("0.5%", Limit(part=Fraction(1, 200))),
        ("100%", Limit(part=Fraction(1))),
    ],
)
def test_a_limit_is_a_number_or_a_percentage(text: str, limit: Limit) -> None:
    assert Limit.parse(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "1 %", "%", "101%", "1e2", "1.5", "all", "0x1", "1%%", "1_0", "٣"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--max-refused .*expected a number of clips or a part"):
        Limit.parse(text)


@pytest.mark.parametrize(
    ("text", "num_refused", "num_total", "exceeds"),
    [
        ("0", 0, 0, False),
        ("0", 1, 100, True),
        ("0%", 1, 10**9, True),
        ("0%", 0, 100, False),
        ("1%", 1, 100, False),
        ("1%", 2, 100, True),
        ("0.1%", 10_000, 10_000_000, False),
        ("0.1%", 10_001, 10_000_000, True),
        ("100%", 100, 100, False),
        ("7", 7, 7, False),
        ("7", 8, 10**9, True),
    ],
)
def test_what_is_allowed_is_exact(text: str, num_refused: int, num_total: int, exceeds: bool) -> None:
    assert Limit.parse(text).exceeds(num_refused, num_total) == exceeds


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (report(), 0),
        (report(max_refused=Limit.parse("10%")), 0),
        (report(max_refused=Limit.parse("9%")), 1),
        (report(max_refused=Limit.parse("9%"), pending=1), 1),
        (report(before=1000, max_refused=Limit.parse("1%")), 0),
        (report(pending=1), 3),
        (report(encoded=0, refused=100), 1),
        (report(encoded=0, refused=0, before=90), 0),
        (report(encoded=0, refused=10, pending=90), 3),
    ],
)
def test_the_exit_code_says_whether_all_is_done(made: JobReport, code: int) -> None:
    assert made.exit_code == code


def test_an_empty_manifest_is_no_failure() -> None:
    assert JobReport(num_rows=0, num_clips=0, tally=Tally()).exit_code == 0


def test_the_table_has_a_line_a_figure() -> None:
    made = report(
        pending=7, seconds={"probing": 2.0, "encoding": 45.0}, num_probed=100, workers=WORKERS, num_lost_workers=1
    )
    assert table(made) == {
        "manifest rows": "101",
        "clips": "100",
        "samples encoded": "90",
        "samples already there": "0",
        "pending, for a later run": "7",
        "SlowDown": "7",
        "refused": "10",
        "not_decodable": "10",
        "shards handed out again": "3",
        "workers lost": "1",
        "bytes written": "1,234",
        "seconds probing": "2.0",
        "seconds encoding": "45.0",
        "probes/s": "50",
        "samples/s": "2.00",
        "of a worker's encoders": "0.47",
        "tokens/s of T5": "50",
        "encoders busy": "95.0%",
        "data wait": "5.0%",
    }


def test_each_reason_has_an_example_and_what_to_do() -> None:
    tally = Tally(refused=Counter({EARLIER: 5}))
    long = "x" * 500
    tally.refuse(
        [
            refusal("not_decodable", "https://u:secret@h/a.mp4?sig=secret"),
            refusal("not_decodable", "second.mp4"),
            refusal("too_small", long, None),
            refusal("missing", "gone\nnewline.mp4", None),
            refusal("no_caption", "row 3", None),
        ]
    )
    text = JobReport(num_rows=9, num_clips=9, tally=tally).table()
    assert "refused by an earlier run               5" in text
    examples = text.split("refused, one of each:\n")[1].splitlines()
    assert examples[0] == "  missing: gone newline.mp4: found that"
    assert examples[1] == "    mend it: the next run tries it again"
    assert "mend the manifest, or the shard" in examples[3]
    assert examples[4:6] == [
        "  not_decodable: https://h/a.mp4: found that",
        "    --retry-refused not_decodable tries it again; a changed file is tried anyway",
    ]
    assert "--buckets" in examples[7]
    assert max(map(len, examples)) < 200
    assert examples[6].endswith("xxx: found that"), "the middle is cut out, not what was found"
    assert "secret" not in text


def test_a_report_says_where_its_run_and_its_refusals_are_to_be_found() -> None:
    made = replace(report(), output="s3://u:secret@bucket/my cache", run_url="s3://u:secret@bucket/my cache/runs/one")
    assert made.table().splitlines()[-2:] == [
        "events, figures and timeline: s3://bucket/my cache/runs/one",
        "all that is refused: python -m shared.cache refused 's3://bucket/my cache'",
    ]
    whole = replace(made, tally=Tally(num_encoded=1))
    assert whole.table().splitlines()[-1] == "events, figures and timeline: s3://bucket/my cache/runs/one"


def test_a_gpu_that_is_set_aside_and_not_used_is_told() -> None:
    idle = Loaded(provenance={}, seconds=3.4, device="cpu x86_64")
    assert "PyTorch sees none: install a CUDA build of torch, or say --device cpu" in idle.told(on_gpu=True)
    assert idle.told(on_gpu=False) == "encoding on cpu x86_64; the encoders loaded in 3 s"
    busy = Loaded(provenance={}, seconds=41.0, device="NVIDIA H100 80GB HBM3")
    assert busy.told(on_gpu=True) == "encoding on NVIDIA H100 80GB HBM3; the encoders loaded in 41 s"


def test_killers_are_taken_up_again_by_their_reason() -> None:
    assert "--retry-refused kills_workers" in remedy(refusal("kills_workers"))


def test_the_summary_has_all_figures_and_no_credentials() -> None:
    made = report(pending=7, seconds={"encoding": 45.0}, workers=WORKERS)
    data = summary_json(
        made,
        config={"manifest": "s3://key:secret@bucket/a.csv", "buckets": ("16x256x256",), "fps": None},
        start=1_700_000_000.0,
        end=1_700_000_050.0,
        exit_reason="told to end",
        exit_code=3,
    )
    value = json.loads(data)
    assert b"secret" not in data
    assert value["config"] == {"manifest": "s3://bucket/a.csv", "buckets": ["16x256x256"], "fps": None}
    assert (value["exit_reason"], value["exit_code"]) == ("told to end", 3)
    assert (value["start"], value["end"]) == ("2023-11-14T22:13:20.000Z", "2023-11-14T22:14:10.000Z")
    assert value["counts"]["encoded"] == 90
    assert value["counts"]["pending"] == 7
    assert value["refused"]["not_decodable"]["count"] == 10
    assert value["refused"]["not_decodable"]["example"]["source"] == "a.mp4"
    assert value["samples_per_second"] == 2.0
    assert value["gpu_busy"] == 0.95
    assert value["workers"]["a"]["gpu_busy"] == 0.9
    assert value["versions"]["ray"] == library_versions()["ray"]


def test_the_summary_of_a_job_that_failed_at_once_can_be_written() -> None:
    made = JobReport(num_rows=0, num_clips=0, tally=Tally())
    data = summary_json(made, config={}, start=0.0, end=0.0, exit_reason="error: no Ray cluster", exit_code=2)
    assert json.loads(data)["gpu_busy"] is None
    assert made.table()


def first(load_seconds: float) -> FirstSample:
    """Returns how long a worker took to its first sample."""
    return FirstSample(worker="a", node="n", place_seconds=2.0, load_seconds=load_seconds, encode_seconds=3.0)


def test_the_time_to_a_workers_first_sample_is_reported() -> None:
    made = report(first_samples=[first(10.0), first(20.0), first(90.0)])
    assert table(made)["seconds to a worker's first sample"] == "25.0"
    assert table(made)["at most"] == "95.0"
    summary = json.loads(summary_json(made, config={}, start=0.0, end=1.0, exit_reason="finished", exit_code=0))
    assert summary["first_sample"]["workers"] == 3
    assert summary["first_sample"]["load_seconds"] == {"median": 20.0, "max": 90.0}
    assert "seconds to a worker's first sample" not in table(report())


def test_nodes_that_were_kept_from_work_are_named() -> None:
    made = report(excluded=[NodeExcluded(node="10.0.0.7 (abcd)", cause="3 workers in a row died there")])
    assert table(made)["nodes kept from work"] == "1"
    assert "  10.0.0.7 (abcd): 3 workers in a row died there" in made.table().splitlines()
    assert "kept from work" not in report().table()


def test_each_reason_why_something_is_pending_has_an_example_without_credentials() -> None:
    made = report()
    made.tally.leave("not_reachable", example="https://user:key@host/a.mp4: time-out")
    made.tally.leave("not_reachable", example="b.mp4: time-out")
    made.tally.leave("the job was told to end", 5)
    lines = made.table().splitlines()
    assert "  not_reachable: https://host/a.mp4: time-out" in lines
    assert not any("b.mp4" in line for line in lines)
    summary = json.loads(summary_json(made, config={}, start=0.0, end=1.0, exit_reason="finished", exit_code=3))
    assert summary["pending"]["not_reachable"] == {"count": 2, "example": "https://host/a.mp4: time-out"}
    assert summary["pending"]["the job was told to end"] == {"count": 5, "example": None}
