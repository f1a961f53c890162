"""What `ffgym measure` prints: every figure beside its counterpart, and how it was measured."""

from __future__ import annotations

from dataclasses import replace

from printed import printed

from ffgym.costs.timing import Spread
from ffgym.measure.memory import Memory
from ffgym.measure.speed import Speed, Workload
from ffgym.measure.table import (
    Footprint,
    Measurement,
    footnotes,
    rate,
    size_rows,
    speed_rows,
)

MB = 10**6
DENSE = Footprint(
    model="SmolLM2, dequantised from Q4_1",
    parameters=134_500_000,
    weight_bytes=269 * MB,
    disk_bytes=269 * MB,
    disk_dtype="float16",
    macs=169.9e6,
    kv_bytes=23_040,
    memory=Memory("resident", before=400 * MB, loaded=690 * MB, peak=750 * MB),
)
PRUNED = replace(
    DENSE,
    model="folder model",
    parameters=113_300_000,
    weight_bytes=227 * MB,
    disk_bytes=227 * MB,
    disk_dtype="bfloat16",
    macs=148.6e6,
    memory=Memory("resident", before=401 * MB, loaded=649 * MB, peak=706 * MB),
)
FOUND = Measurement(
    dense=DENSE,
    pruned=PRUNED,
    speeds=(
        Speed(
            "prefill",
            Workload(1, 1024),
            Spread(1234.5, 1200, 1300),
            Spread(1400, 1390, 1410),
            Spread(1.134, 1.1, 1.2),
            1.15,
        ),
        Speed("decode", Workload(4, 128), Spread(9.876, 9, 10), Spread(11.5, 11, 12), Spread(1.16, 1.15, 1.17), 1.187),
    ),
    context=1024,
    memory_work=(4, 1024),
    device="Some CPU (AVX512)",
    threads=2,
    dtype="bfloat16",
    torch="2.13.0",
    transformers="5.24.0",
    repetitions=7,
)


def rendered(found=FOUND, width=100):
    return printed(*found.tables(), width=width)


def test_sizes_stand_side_by_side():
    assert size_rows(FOUND) == [
        ("parameters", "134.5 M", "113.3 M", "1.19"),
        ("bytes on disk", "269.0 MB float16", "227.0 MB bfloat16", "1.19"),
        ("MACs/token", "169.9 M", "148.6 M", "1.14"),
        ("KV/token", "23.0 kB", "23.0 kB", "1.00"),
        ("weights in bfloat16", "269.0 MB", "227.0 MB", "1.19"),
        ("memory once loaded", "290.0 MB", "248.0 MB", "1.17"),
        ("peak memory", "350.0 MB", "305.0 MB", "1.15"),
    ]


def test_speeds_stand_beside_their_ceilings():
    assert list(speed_rows(FOUND)) == [
        ("prefill", "1", "1,024", "1,234 (1,200-1,300)", "1,400 (1,390-1,410)", "1.13 (1.10-1.20)", "1.15"),
        ("decode", "4", "128", "9.88 (9.00-10.0)", "11.5 (11.0-12.0)", "1.16 (1.15-1.17)", "1.19"),
    ]


def test_the_notes_say_how_it_was_measured():
    text = " ".join(footnotes(FOUND))
    for part in (
        "SmolLM2, dequantised from Q4_1",
        "Some CPU (AVX512), 2 threads, bfloat16, torch 2.13.0, transformers 5.24.0",
        "medians of 7 repetitions in which the models take turns, quartiles in brackets",
        "16 greedy steps",
        "beyond the 400.0 MB of Python and the libraries; peak at 4 x 1,024 tokens",
        "The pruned model takes 42.0 MB less once loaded and 45.0 MB less at the peak",
        "; the parameters say 42.0 MB less.",
    ):
        assert part in text


def test_a_smaller_cache_is_named_beside_the_parameters():
    found = replace(FOUND, pruned=replace(PRUNED, kv_bytes=15_360))
    assert "the parameters say 42.0 MB less, and the cache at the peak 31.5 MB less." in footnotes(found)[-1]


def test_memory_of_a_gpu_is_named_as_such():
    memory = Memory("cuda", before=0, loaded=270 * MB, peak=300 * MB)
    found = replace(FOUND, dense=replace(DENSE, memory=memory), pruned=replace(PRUNED, memory=memory), threads=0)
    assert "CUDA allocator handed out in a fresh process; peak" in footnotes(found)[-1]
    assert "thread" not in footnotes(found)[0]


def test_without_memory_there_is_no_row_and_no_note():
    found = replace(FOUND, dense=replace(DENSE, memory=None))
    assert [row[0] for row in size_rows(found)][-1] == "weights in bfloat16"
    assert len(footnotes(found)) == 2


def test_markdown_has_two_tables_and_the_notes():
    text = "\n".join(table.markdown() for table in FOUND.tables())
    lines = text.splitlines()
    assert lines[0] == "|  | dense | pruned | dense / pruned |"
    assert "| parameters | 134.5 M | 113.3 M | 1.19 |" in lines
    assert "| prefill | 1 | 1,024 | 1,234 (1,200-1,300) | 1,400 (1,390-1,410) | 1.13 (1.10-1.20) | 1.15 |" in lines
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert set(tables) == {5, 8}
    assert "Q4\\_1" in text
    assert text.endswith("42.0 MB less.\n")


def test_the_terminal_shows_the_same_cells():
    text = rendered()
    for row in (*size_rows(FOUND), *speed_rows(FOUND)):
        for cell in row:
            assert cell in text
    narrow = rendered(width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow


def test_speeds_have_three_digits_and_fit_a_column():
    assert rate(Spread(25.04, 24.96, 25.14)) == "25.0 (25.0-25.1)"
    assert rate(Spread(17_022, 999.4, 247_000)) == "17.0k (999-247k)"
    assert rate(Spread.of([25.04])) == "25.0", "a single repetition has no quartiles"


def test_a_model_that_is_measured_against_itself_is_called_the_same() -> None:
    assert "The same model twice" in footnotes(replace(FOUND, pruned=DENSE))[1]
    assert "The same model" not in " ".join(footnotes(FOUND))


def test_few_repetitions_have_a_range():
    assert "medians of 3 repetitions in which the models take turns, range in brackets" in " ".join(
        footnotes(replace(FOUND, repetitions=3))
    )
