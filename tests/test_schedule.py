"""Steps as text, steps in latent frames, and which edits a running video allows."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest

from sneakpeek_core.schedule import (
    MAX_SECONDS,
    MAX_STEPS,
    MAX_TEXT,
    Schedule,
    Step,
    Timeline,
    check_edit,
    parse_steps,
)

FPS = 16.0


def schedule(*steps: tuple[float, str], base: str = "") -> Schedule:
    return Schedule(tuple(Step(text=text, seconds=seconds) for seconds, text in steps), base)


# -- text in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("[4s] whisk", 4.0),
        ("[4] whisk", 4.0),
        ("[2.5s] whisk", 2.5),
        ("[.5 s] whisk", 0.5),
        ("[3.S] whisk", 3.0),
        ("  [ 4s ]whisk  ", 4.0),
    ],
)
def test_durations(line: str, seconds: float):
    """A duration is a decimal number of seconds in brackets; the s and spaces are optional."""
    assert parse_steps(line).steps == (Step(text="whisk", seconds=seconds),)


def test_base_comments_blank_lines_and_bom():
    """A byte-order mark, blank lines and # lines are skipped; base: goes in front of every step."""
    read = parse_steps(
        "\ufeff# a recipe\r\n\r\nBase: a bright kitchen,\r\n[1s] crack the egg\r\n"
        "  # not yet\r\n[2s] whisk [fast] # briskly\r\n"
    )
    assert read.base == "a bright kitchen,"
    assert [step.text for step in read.steps] == ["crack the egg", "whisk [fast] # briskly"]
    assert read.prompt(0) == "a bright kitchen, crack the egg"
    assert read.seconds == 3.0


def test_default_duration():
    """Lines without a duration take the default when there is one, and only they do."""
    read = parse_steps("pour\n[2s] stir", default_seconds=3.5)
    assert [step.seconds for step in read.steps] == [3.5, 2.0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("stir", "'stir' has no duration; write a duration in seconds in front, as in [4s]"),
        ("[4s stir", "the bracket in '[4s stir' is not closed; write"),
        ("[soon] stir", "[soon] is not a duration; write"),
        ("[1e3s] stir", "[1e3s] is not a duration; write"),
        ("[-2s] stir", "[-2s] is not a duration; write"),
        ("[nan] stir", "[nan] is not a duration; write"),
        ("[] stir", "[] is not a duration; write"),
        ("[0s] stir", "0 seconds is not a duration; use more than 0"),
        (f"[{'9' * 400}s] stir", "inf seconds is not a duration"),
        ("[4s]  ", "the step has no text; say what happens in it"),
        ("[4s] " + "x" * (MAX_TEXT + 1), f"{MAX_TEXT + 1} characters; at most {MAX_TEXT}"),
        ("base: two", "a second base: line; keep one"),
    ],
    ids=lambda value: value[:12],
)
def test_bad_lines_are_named_by_number(bad: str, words: str):
    """What is wrong is said with the line's number as an editor counts it, and with the fix."""
    with pytest.raises(ValueError) as error:
        parse_steps(f"\ufeff# comment\n\nbase: one\n[1s] fine\n{bad}\n[2s] fine too")
    assert str(error.value).startswith("line 5: ")
    assert words in str(error.value)


def test_an_empty_base_is_refused():
    """`base:` without text is a mistake, named by its line."""
    with pytest.raises(ValueError, match="line 2: base: is empty; write its text or remove"):
        parse_steps("[1s] stir\nbase:  ")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing", "base: a kitchen"])
def test_a_schedule_has_steps(text: str):
    """No steps is refused, with an example of one."""
    with pytest.raises(ValueError, match=r"has no steps; write one a line, as in \[4s\] whisk"):
        parse_steps(text)


def test_limits_of_a_schedule():
    """Step count and total length are bounded, exactly at their limits, and the fix is named."""
    assert len(schedule(*[(1.0, "x")] * MAX_STEPS).steps) == MAX_STEPS
    with pytest.raises(ValueError, match=f"has {MAX_STEPS + 1} steps; at most .* split it"):
        schedule(*[(1.0, "x")] * (MAX_STEPS + 1))
    assert schedule((MAX_SECONDS, "x")).seconds == MAX_SECONDS
    with pytest.raises(ValueError, match="lasts 86401 s; at most 86400 s are allowed: split it"):
        schedule((MAX_SECONDS, "x"), (1.0, "x"))


# -- text out --------------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    letters = "aä ñ 香水 🍳👩‍🍳 العربية [4s] base: # é, \u0301 \u00a0 \u200b {}\\ \"' %s"
    text = "".join(rng.choices(letters, k=rng.randint(1, 40))).strip()
    return text or "x"


def test_text_round_trip():
    """What a schedule writes is read back as the same schedule, whatever the texts hold."""
    rng = random.Random(0)
    for _ in range(200):
        steps = tuple(
            Step(text=random_text(rng), seconds=rng.choice([4.0, 0.25, rng.randint(1, 9999) / 100]))
            for _ in range(rng.randint(1, 12))
        )
        written = Schedule(steps, random_text(rng) if rng.random() < 0.5 else "")
        assert parse_steps(written.to_text()) == written
        assert parse_steps("\ufeff" + written.to_text().replace("\n", "\r\n")) == written


def test_every_duration_survives_text():
    """A duration is written with all its digits and without an exponent."""
    rng = random.Random(1)
    lengths = [1 / 3, 1e-5, 12345.678, 86399.99, *(rng.uniform(0.1, 900) for _ in range(50))]
    for seconds in lengths:
        written = schedule((seconds, "x"))
        assert parse_steps(written.to_text()) == written


@pytest.mark.parametrize("gap", ["\n", "\r\n", "\u2028", "\x85", "\n[9s] "])
def test_a_text_of_several_lines_stays_one_step(gap: str):
    """Steps that nodes hand in can hold line breaks; written out they are still one step each."""
    written = schedule((1.0, f"whisk{gap}the eggs"), (2.0, "pour"))
    read = parse_steps(written.to_text())
    assert [step.seconds for step in read.steps] == [1.0, 2.0]
    assert read.steps[0].text.split() == written.steps[0].text.split()


# -- more steps behind -----------------------------------------------------------------------------


def test_extended_with_the_same_base():
    """The new steps come behind; a shared base is kept as it is."""
    both = schedule((1, "a"), base="in").extended(schedule((2, "b"), base="in"))
    assert both == schedule((1, "a"), (2, "b"), base="in")


@pytest.mark.parametrize(("own", "more"), [("in", "out"), ("in", ""), ("", "out")])
def test_extended_with_another_base(own: str, more: str):
    """With different bases every step keeps the prompt it had, and durations are untouched."""
    first, second = schedule((1, "a"), (2, "b"), base=own), schedule((3, "c"), base=more)
    both = first.extended(second)
    prompts = [first.prompt(0), first.prompt(1), second.prompt(0)]
    assert [both.prompt(i) for i in range(3)] == prompts
    assert [step.seconds for step in both.steps] == [1, 2, 3]


def test_extended_carries_embeddings_and_goals():
    """Ready-made embeddings and goals go along, also where the base goes into the text."""
    embeds, goal = object(), object()
    more = Schedule((Step(text="b", seconds=1, embeds=embeds, goal=goal),), "out")
    step = schedule((1, "a"), base="in").extended(more).steps[1]
    assert step.embeds is embeds
    assert step.goal is goal


# -- latent frames ---------------------------------------------------------------------------------


def random_schedule(rng: random.Random, fps: float) -> Schedule:
    shortest = 8 / fps  # two latent frames: no rounding can swallow it
    return schedule(
        *((round(shortest + rng.random() * 9, 3), f"step {i}") for i in range(rng.randint(1, 15)))
    )


def test_boundaries_against_exact_arithmetic():
    """Step ends lie where fractions put them, strictly increase, and frames total 1 + 4k."""
    rng = random.Random(2)
    for _ in range(200):
        fps = rng.choice([8.0, 12.0, 16.0, 24.0, 30.0])
        steps = random_schedule(rng, fps)
        timeline = Timeline.of(steps, fps)
        total, start = Fraction(0), 0
        for index, step in enumerate(steps.steps):
            total += Fraction(str(step.seconds))
            exact = 1 + total * Fraction(fps) / 4
            assert abs(timeline.ends[index] - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
            assert timeline.start(index) == start < timeline.ends[index]
            start = timeline.ends[index]
        assert all(a < b for a, b in pairwise(timeline.ends))
        assert timeline.latent_frames == timeline.ends[-1]
        assert timeline.frames == 1 + 4 * (timeline.latent_frames - 1)


def test_steps_of_frames_against_counting():
    """`step_of` is the step whose [start, end) holds the frame; behind the end it is the last."""
    rng = random.Random(3)
    for _ in range(100):
        timeline = Timeline.of(random_schedule(rng, FPS), FPS)
        owners = [s for s in range(len(timeline.ends)) for _ in range(*span_of(timeline, s))]
        assert [timeline.step_of(f) for f in range(timeline.latent_frames)] == owners
        assert timeline.step_of(timeline.latent_frames + 5) == len(timeline.ends) - 1


def span_of(timeline: Timeline, step: int) -> tuple[int, int]:
    return timeline.start(step), timeline.ends[step]


def test_decoded_frames_of_steps():
    """Decoded frames tile without gaps: the first latent frame gives 1, every later one 4."""
    timeline = Timeline.of(parse_steps("[1s] a\n[0.5s] b\n[2s] c"), FPS)
    assert timeline.ends == (5, 7, 15)
    assert [timeline.frame_range(s) for s in range(3)] == [(0, 17), (17, 25), (25, 57)]
    assert timeline.frames == 57


def test_a_step_too_short_to_show_is_refused():
    """A step that rounds to no latent frame is named, with the least duration that works."""
    with pytest.raises(ValueError, match=r"step 2 lasts 0.05 s, .* at least 0.25 s at 16 frames"):
        Timeline.of(schedule((1, "a"), (0.05, "b"), (1, "c")), FPS)
    with pytest.raises(ValueError, match=r"step 1 lasts 0.1 s, less than one latent frame"):
        Timeline.of(schedule((0.1, "a")), FPS)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e308, "16", True, None])
def test_impossible_frame_rates_are_refused(fps: Any):
    """A frame rate is a finite number above 0 and at most 1000."""
    with pytest.raises(ValueError, match=r"fps .* is not allowed; use more than 0, up to 1000"):
        Timeline.of(schedule((1, "a")), fps)


def test_one_latent_frame_is_always_enough():
    """What the message recommends works: a step of 4/fps seconds fits behind any other steps."""
    rng = random.Random(4)
    for fps in (8.0, 16.0, 24.0, 30.0):
        for _ in range(300):
            before = math.ceil(8 / fps * 1000) + rng.randint(0, 3000)
            Timeline.of(schedule((before / 1000, "a"), *[(4 / fps, "b")] * 3), fps)


# -- edits -----------------------------------------------------------------------------------------

OLD = schedule((1, "a"), (1, "b"), (1, "c"), (1, "d"))  # ends 5, 9, 13, 17


def test_coming_steps_are_free():
    """Steps that have not begun can be changed, removed, reordered and added."""
    for new in (
        schedule((1, "a"), (1, "b"), (3, "x"), (0.5, "y"), (2, "z")),
        schedule((1, "a"), (1, "b"), (1, "d"), (1, "c")),
        schedule((1, "a"), (1, "b")),
    ):
        assert check_edit(OLD, new, FPS, made=6) == Timeline.of(new, FPS)


def test_the_running_step_may_change_its_text_and_its_end():
    """The step that is being made keeps its start; its text and its length are free."""
    assert check_edit(OLD, schedule((1, "a"), (2, "B")), FPS, made=6).ends == (5, 13)
    # A step begins with the first frame behind the one before: at 5, step 2 runs.
    assert check_edit(OLD, schedule((1, "a"), (2, "B")), FPS, made=5).ends == (5, 13)


@pytest.mark.parametrize(
    "new",
    [
        schedule((1, "A"), (1, "b"), (5, "c")),
        schedule((1.25, "a"), (1, "b"), (5, "c")),
        schedule((0.75, "a"), (1.25, "b"), (5, "c")),
        schedule((1, "b"), (1, "a"), (5, "c")),
        schedule((1, "a"), (1, "b"), (5, "c"), base="in"),
    ],
    ids=["text", "longer", "shorter", "swapped", "base"],
)
def test_finished_steps_stay(new: Schedule):
    """A step that has ended keeps prompt and end; the message names it and what may be edited."""
    with pytest.raises(ValueError, match=r"step 1 has been generated .* edit step 3 or later"):
        check_edit(OLD, new, FPS, made=9)
    assert check_edit(OLD, new, FPS, made=4)  # while step 1 runs, it is allowed


def test_finished_embeddings_stay():
    """A finished step with its own embeddings keeps those very embeddings."""
    mine, other = object(), object()
    tail = Step(text="b", seconds=1)
    old = Schedule((Step(text="a", seconds=1, embeds=mine), tail))
    check_edit(old, Schedule((Step(text="a", seconds=1, embeds=mine), tail)), FPS, made=5)
    with pytest.raises(ValueError, match="step 1 has been generated"):
        check_edit(old, Schedule((Step(text="a", seconds=1, embeds=other), tail)), FPS, made=5)


def test_moving_the_base_into_the_steps_is_no_change():
    """What counts is the prompt a step was made with, not how it is written."""
    old = schedule((1, "a"), (1, "b"), base="in")
    assert check_edit(old, schedule((1, "in a"), (1, "in b")), FPS, made=6).ends == (5, 9)


@pytest.mark.parametrize(("made", "seconds"), [(11, 2.5), (9, 2.0)])
def test_an_edit_must_leave_something_to_make(made: int, seconds: float):
    """A schedule that ends at or before what has been made is refused with both times."""
    short = schedule((1, "a"), (1, "b"))
    with pytest.raises(ValueError, match=rf"ends at 2 s, but {seconds:g} s have .* make it longer"):
        check_edit(OLD, short, FPS, made=made)


def test_an_edit_is_itself_a_schedule_that_fits():
    """A coming step too short to show is refused when the edit is made."""
    with pytest.raises(ValueError, match=r"step 3 lasts 0.05 s, less than one latent frame"):
        check_edit(OLD, schedule((1, "a"), (1, "b"), (0.05, "c"), (2, "d")), FPS, made=3)


def test_what_was_made_of_the_running_step_stays_its_own():
    """The running step cannot end before what exists: its frames would change hands."""
    with pytest.raises(ValueError, match=r"step 2 would end at 1.25 s, but 1.75 s .*longer"):
        check_edit(OLD, schedule((1, "a"), (0.25, "b"), (5, "c")), FPS, made=8)
    assert check_edit(OLD, schedule((1, "a"), (0.75, "b"), (5, "c")), FPS, made=8).ends[1] == 8


def test_a_finished_video_can_only_be_lengthened():
    """When all is made no step may change any more, but more may follow."""
    made = Timeline.of(OLD, FPS).latent_frames
    with pytest.raises(ValueError, match="has been generated and cannot change"):
        check_edit(OLD, schedule((1, "a"), (1, "b"), (1, "other"), (3, "d")), FPS, made=made)
    longer = OLD.extended(schedule((2, "d")))
    assert check_edit(OLD, longer, FPS, made=made).latent_frames == made + 8
