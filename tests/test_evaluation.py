"""Evaluations: paired, counted, written down; what a table says is what was made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sneakpeek_core.assembly import Files, Parts, load_parts
from sneakpeek_core.cli import main
from sneakpeek_core.cli.sampling import settings_of_preset
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.toyworld import controls, evaluation
from sneakpeek_core.toyworld.evaluation import Grid, evaluate, settings_of
from sneakpeek_core.toyworld.render import render
from sneakpeek_core.toyworld.results import MEASURES, Cell, Row, Rows, best, cell_of, compared
from sneakpeek_core.toyworld.rollouts import (
    Rollout,
    encode_step_ends,
    roll_out,
    schedule_of,
    stream_of,
)
from sneakpeek_core.toyworld.scene import make_scene, other_move
from sneakpeek_core.toyworld.score import VideoScore
from sneakpeek_core.vae.streaming import encode_image
from tests.command_line import Shelf, make_shelf

GRID = Grid(
    tier="tabletop", steps=(2,), chunks=(3,), modes=("none", "predicted", "oracle", "wrong"),
    sampling_steps=(1, 3), videos=3, seed=0, shift=3.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def parts(shelf: Shelf) -> Parts:
    files = Files.of(shelf.model, shelf.vae, shelf.text_encoder)
    return load_parts(files, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def settings(parts: Parts) -> SamplerSettings:
    return replace(settings_of_preset(parts.preset), span=19)


@pytest.fixture(scope="module")
def result(parts: Parts, settings: SamplerSettings) -> evaluation.Evaluation:
    return evaluate(parts, settings, GRID)


def test_every_cell_is_a_row(result: evaluation.Evaluation):
    """One row per steps, chunk, mode and sampling steps, each with all its numbers."""
    cells = [(2, 3, mode, n) for mode in GRID.modes for n in (1, 3)]
    assert list(result.rows) == [cell_of(row) for row in result.rows.values()] == cells
    promised = {
        "tier", "steps", "chunk", "guidance", "sampling_steps", "videos", "step_success",
        "step_success_se", "persistence", "position_error_px", "psnr_drift_db", "seconds",
    }  # fmt: skip
    for row in map(asdict, result.rows.values()):
        assert promised <= set(row) and row["videos"] == 3
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float)))


def test_compute_is_counted(result: evaluation.Evaluation):
    """Latent frames through the transformer: passes of chunks, context passes, plans and guides.

    Two steps of two chunks: 4 x 3 frames a pass; context passes of the start picture and of every
    chunk but the last, which nothing follows. Planned guidance adds, at each step, its keyframes
    once a pass and once to be seen.
    """
    passes = {(row.guidance, row.sampling_steps): row.frame_passes for row in result.rows.values()}
    assert passes["none", 1] == 1 + 9 + 12 and passes["none", 3] == 1 + 9 + 36
    for n in (1, 3):
        keyframes = (passes["predicted", n] - passes["none", n]) / (n + 1)
        assert keyframes == int(keyframes) and 2 <= keyframes <= 4
        # given ones are only seen, not denoised
        for mode in ("oracle", "wrong"):
            assert passes[mode, n] == passes["none", n] + keyframes


def test_comparisons_are_paired(result: evaluation.Evaluation):
    """Each guided mode against none: at the same steps, at each one's best, at as much compute."""
    for mode in ("predicted", "oracle", "wrong"):
        found = [one for one in result.comparisons if one.guidance == mode]
        assert [one.at for one in found] == [
            "same sampling steps", "same sampling steps", "best of each",
            "as much compute for none",
        ]  # fmt: skip
        for one in found:
            guided = result.measured[2, 3, mode, one.sampling_steps]["position_error_px"]
            plain = result.measured[2, 3, "none", one.none_sampling_steps]["position_error_px"]
            mean = sum(a - b for a, b in zip(guided, plain, strict=True)) / 3
            assert one.differences["position_error_px"][0] == pytest.approx(mean)


def row_of(cell: Cell, success: float, passes: int, error: float = 1.0) -> Row:
    """A row of which only what comparisons look at means anything."""
    numbers: dict[str, Any] = dict.fromkeys((field.name for field in fields(Row)), 0.0)
    steps, chunk, guidance, sampling_steps = cell
    return Row(**numbers | {
        "steps": steps, "chunk": chunk, "guidance": guidance, "sampling_steps": sampling_steps,
        "step_success": success, "frame_passes": passes, "position_error_px": error,
    })  # fmt: skip


def opponents(found: list[Row], plain: list[Row] | None = None) -> dict[str, int]:
    """Which unguided row the best guided one is compared with, by the kind of comparison."""

    def whole(rows: list[Row]) -> tuple[dict, dict]:
        measures = {name: [0.0, 1.0] for name in MEASURES}
        cells = [cell_of(row) for row in rows]
        return dict(zip(cells, rows, strict=True)), dict.fromkeys(cells, measures)

    rows, measured = whole(found)
    other = None
    if plain is not None:
        plain_rows, plain_measured = whole(plain)
        other = Rows(rows=plain_rows, measured=plain_measured)
    made = evaluation.Evaluation(rows=rows, measured=measured, plain=other)
    return {
        one.at: one.none_sampling_steps
        for one in made.comparisons
        if one.at != "same sampling steps"
    }


def test_as_much_compute_is_what_guidance_spends_rounded_up():
    """None may be as dear as the next dearer row there is, and cheaper if that is better."""
    guided = row_of((8, 1, "predicted", 4), 0.9, 60)
    none = [row_of((8, 1, "none", n), s, 10 * n) for n, s in ((2, 0.5), (4, 0.7), (8, 0.6))]
    assert opponents([guided, *none]) == {"best of each": 4, "as much compute for none": 4}
    better = [*none[:2], row_of((8, 1, "none", 8), 0.8, 80), row_of((8, 1, "none", 9), 0.95, 90)]
    assert opponents([guided, *better]) == {"best of each": 9, "as much compute for none": 8}
    # none never spends as much as this: no claim is made
    dear = row_of((8, 1, "predicted", 4), 0.9, 500)
    assert opponents([dear, *none]) == {"best of each": 4}


def test_of_equals_the_nearest_to_the_truth_is_best():
    """However the grid was ordered."""
    rows = [row_of((8, 1, "none", n), 0.9, 10, e) for n, e in ((2, 1.5), (4, 0.5), (8, 1.0))]
    assert best(rows) == best(rows[::-1]) == rows[1]


def test_another_model_s_rows_stand_in_for_unguided_ones():
    """With them, the model's own are no longer what guidance is compared with."""
    guided = row_of((8, 1, "predicted", 4), 0.9, 60)
    own, other = row_of((8, 1, "none", 2), 0.5, 20), row_of((8, 1, "none", 4), 0.8, 40)
    assert opponents([guided, own])["best of each"] == 2
    assert opponents([guided], [other])["best of each"] == 4


def test_unguided_rows_are_compared_with_another_model_s():
    """Whether a gain counts depends on it: none must be as good as a model without keyframes."""
    own = [row_of((8, 1, "none", n), s, 10 * n) for n, s in ((2, 0.7), (4, 0.6))]
    other = [row_of((8, 1, "none", n), s, 10 * n) for n, s in ((2, 0.5), (4, 0.8))]
    values = {(8, 1, "none", n): {key: [1.0, 0.5, 0.0] for key in MEASURES} for n in (2, 4)}
    lower = {cell: {key: [0.5, 0.5, 0.25] for key in MEASURES} for cell in values}
    found = compared(
        Rows(rows={cell_of(row): row for row in own}, measured=values),
        Rows(rows={cell_of(row): row for row in other}, measured=lower),
    )
    assert [(one.at, one.sampling_steps, one.none_sampling_steps) for one in found] == [
        ("same sampling steps", 2, 2), ("same sampling steps", 4, 4), ("best of each", 2, 4),
    ]  # fmt: skip
    for one in found:
        assert (one.guidance, one.better, one.worse) == ("none", 1, 1)
        mean, error = one.differences["step_success"]
        # 0.5, 0 and -0.25: mean 1/12, deviation 0.382
        assert mean == pytest.approx(1 / 12) and error == pytest.approx(0.2205, abs=1e-3)


def test_guidance_without_strength_is_none(parts: Parts, settings: SamplerSettings):
    """The same noise under every mode: what does not act changes nothing, bit for bit."""
    scenes = [make_scene(seed, 2) for seed in (3, 8)]
    none = settings_of(settings, GRID, (2, 3, "none", 3))
    weak = settings_of(settings, GRID, (2, 3, "predicted", 3))
    assert weak.guidance is not None
    weak = replace(weak, guidance=replace(weak.guidance, strength=0.0))
    made, same = (roll_out(parts, stream_of(parts, scenes, s)).latents_BCFHW for s in (none, weak))
    assert torch.equal(made, same)


def test_wrong_keyframes_are_another_scene_s(
    parts: Parts, settings: SamplerSettings, monkeypatch: pytest.MonkeyPatch
):
    """Oracle shows each scene its own step ends, wrong the next scene's."""
    shown: dict[str, list[int]] = {"oracle": [], "wrong": []}
    for mode, seeds in shown.items():

        def spy(parts: Parts, scenes, seeds=seeds):
            seeds += [scene.seed for scene in scenes]
            return encode_step_ends(parts, scenes)

        monkeypatch.setattr(evaluation, "encode_step_ends", spy)
        evaluation.run_cell(parts, settings, GRID, (2, 3, mode, 1))
    assert shown == {"oracle": [0, 1, 2], "wrong": [1, 2, 0]}


def test_the_same_grid_gives_the_same_numbers(
    parts: Parts, settings: SamplerSettings, result: evaluation.Evaluation
):
    """Scenes and noise follow the seed: a row can be made again alone."""
    alone = replace(GRID, modes=("oracle",), sampling_steps=(3,))
    cell = (2, 3, "oracle", 3)
    again = asdict(evaluate(parts, settings, alone).rows[cell])
    known = asdict(result.rows[cell])
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in known.items() if k != "seconds"
    }


def test_a_row_of_a_batch_is_the_video_made_alone(parts: Parts, settings: SamplerSettings):
    """Batching changes rounding, nothing else: noise, text and keyframes are each scene's own."""
    scenes = [make_scene(seed, 2) for seed in (3, 8)]
    own = settings_of(settings, GRID, (2, 3, "oracle", 2))
    together = roll_out(parts, stream_of(parts, scenes, own, encode_step_ends(parts, scenes)))
    for row, scene in enumerate(scenes):
        goals = encode_step_ends(parts, [scene])
        alone = roll_out(parts, stream_of(parts, [scene], own, goals))
        gap = (alone.latents_BCFHW[0] - together.latents_BCFHW[row]).abs().max()
        assert gap < 1e-3 * alone.latents_BCFHW.abs().max()
        assert alone.frames_BFHWC.shape == (1, scene.frames, 64, 64, 3)


def test_oracle_keyframes_are_the_true_step_ends(parts: Parts):
    """The rendered last frames of steps, each encoded alone."""
    scene = make_scene(5, 2)
    frames = render(scene)
    for step, goal in enumerate(encode_step_ends(parts, [scene])):
        with torch.no_grad():
            expected = encode_image(parts.vae, frames[None, 24 * (step + 1)])
        assert torch.allclose(goal, expected, atol=1e-5)


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rollout of a control is the rendered truth of what its stream was told, edits too."""
    told: dict[int, list] = {}
    plain_stream_of = controls.stream_of

    def remember(parts, scenes, *rest):
        stream = plain_stream_of(parts, scenes, *rest)
        told[id(stream)] = [stream, scenes]
        return stream

    def schedule_of_changed(parts, scenes, *rest):
        for entry in told.values():
            entry.append(scenes)
        return schedule_of(parts, scenes, *rest)

    def truth(parts, stream):
        made = roll_out(parts, stream)
        scenes = told[id(stream)][-1]
        told.clear()
        frames = torch.stack([(render(scene) * 255).round().byte() for scene in scenes])
        return Rollout(
            frames_BFHWC=frames, latents_BCFHW=made.latents_BCFHW, frame_passes=made.frame_passes
        )

    monkeypatch.setattr(controls, "stream_of", remember)
    monkeypatch.setattr(controls, "schedule_of", schedule_of_changed)
    monkeypatch.setattr(controls, "roll_out", truth)


@pytest.mark.usefixtures("perfect")
def test_controls_measure_what_they_say(parts: Parts, settings: SamplerSettings):
    """A model that does what it is told scores full, and nothing where the texts are shuffled."""
    own = settings_of(settings, GRID, (3, 3, "predicted", 1))
    shuffled = controls.shuffled_texts(parts, own, GRID.scenes(3))
    assert shuffled.videos == 3 and shuffled.told[0] == 1 and shuffled.shuffled[0] < 0.5
    pairs = controls.editable(GRID)
    edited = controls.edited_step(parts, own, pairs)
    assert (edited.videos, edited.success[0], edited.old_success[0]) == (3, 1.0, 1.0)
    goals = controls.goal_images(parts, own, controls.open_ended(GRID))
    assert goals.given_px[0] < 0.5 and goals.gain_px == (0.0, 0.0)


def test_an_edit_leaves_what_was_made(parts: Parts, settings: SamplerSettings):
    """Chunks before it are the unedited stream's bit for bit, chunks after it are not.

    With one chunk per step the first step is over when the edit comes: it is kept as it was.
    """
    for chunk in (3, 6):
        own = settings_of(settings, GRID, (3, chunk, "none", 1))
        pairs = controls.editable(GRID)
        assert controls.edited_step(parts, own, pairs).chunks_kept == 1.0
    own = settings_of(settings, GRID, (3, 3, "none", 1))
    scene, move = controls.editable(GRID)[0]
    changed = replace(scene, moves=(scene.moves[0], move, scene.moves[2]))
    plain = roll_out(parts, stream_of(parts, [scene], own)).latents_BCFHW
    stream = stream_of(parts, [scene], own)
    stream.chunk(1)
    stream.edit(schedule_of(parts, [changed]))
    edited = roll_out(parts, stream).latents_BCFHW
    assert torch.equal(plain[:, :, :7], edited[:, :, :7])
    assert not torch.equal(plain[:, :, 7:10], edited[:, :, 7:10])


def test_as_many_scenes_are_edited_as_there_are_videos():
    """Each with another object and another place; too few objects are refused in words."""
    grid = replace(GRID, videos=64)
    pairs = controls.editable(grid)
    assert len({scene.seed for scene, _ in pairs}) == 64
    for scene, move in pairs:
        assert move == other_move(scene, 1)
        assert move.thing != scene.moves[1].thing and move.place != scene.moves[1].place
    with pytest.raises(ValueError, match="2 objects"):
        controls.editable(replace(GRID, objects=2))


def test_what_the_vae_loses_is_measured(parts: Parts):
    """Random weights lose everything; the numbers are those of the scorer."""
    lost = controls.reconstructed(parts, GRID.scenes(1))
    assert lost.videos == 3 and lost.psnr_db[0] < 20 and lost.standing < 0.2


def test_training_scenes_are_not_evaluated_on():
    """Seeds of a grid are blocks of scenes; those that training may have seen are refused."""
    assert replace(GRID, seed=9).first_scene + 99_999 < 1_000_000
    with pytest.raises(ValueError, match="use 0 to 9"):
        replace(GRID, seed=10)


def test_the_command_writes_rows_comparisons_and_a_plot(shelf: Shelf, tmp_path: Path):
    """`sneakpeek evaluate` with a JSON file and a picture."""
    path = tmp_path / "rows.json"
    code = main(
        [
            "evaluate", *shelf.options, "--steps", "1", "--guidance", "none,predicted",
            "--sampling-steps", "1,2", "--videos", "2", "--json", str(path),
            "--plot", str(tmp_path / "plot.png"), "--window", "6", "--sink", "0",
        ]
    )  # fmt: skip
    assert code == 0
    found = json.loads(path.read_text())
    assert [row["guidance"] for row in found["rows"]] == ["none", "none", "predicted", "predicted"]
    assert {field.name for field in fields(Row)} == set(found["rows"][0])
    assert found["comparisons"] and [video["cell"] for video in found["videos"]] == [
        [1, 3, "none", 1], [1, 3, "none", 2], [1, 3, "predicted", 1], [1, 3, "predicted", 2],
    ]  # fmt: skip
    facts = found["options"]
    assert facts["weights"] and facts["vae"] and facts["settings"]["policy"]["window"] == 6
    assert facts["settings"]["policy"]["sink"] == 0
    every_step = found["videos"][0]["every_step"]
    assert len(every_step) == 2 and set(every_step[0][0]) >= {"success", "psnr_db"}
    # its own unguided rows, from the file, give the same comparisons
    again = [
        "evaluate", *shelf.options, "--steps", "1", "--guidance", "predicted",
        "--sampling-steps", "1,2", "--videos", "2", "--json", str(tmp_path / "again.json"),
        "--against", str(path), "--window", "6", "--sink", "0",
    ]  # fmt: skip
    assert main(again) == 0
    found_again = json.loads((tmp_path / "again.json").read_text())["comparisons"]
    for mine, other in zip(found_again, found["comparisons"], strict=True):
        for name, pair in other.pop("differences").items():
            assert mine["differences"][name] == pytest.approx(pair, abs=1e-3)  # rounded in files
        assert mine.pop("differences") and mine == other
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--guidance", "some"], "guidance 'some'"),
        (["--videos", "1"], "videos 1"),
        (["--steps", "x"], "list of numbers"),
        (["--json", "nowhere/a.json"], "nowhere"),
        (["--json", "."], "is a folder"),
        (["--tier", "kitchen"], "kitchen"),
        (["--seed", "10"], "use 0 to 9"),
        (["--chunk", "3,13"], "one chunk of 13"),
        (["--sampling-steps", "2000"], "2000"),
        (["--sampling-steps", "2", "--plan-passes", "4"], "plan passes 4"),
        (["--objects", "2", "--controls"], "2 objects"),
        (["--against", "none.json"], "none.json"),
        (["--against", "a.json", "--json", "./a.json"], "would replace"),
        (["--videos", "100001"], "use 64"),
    ],
)
def test_bad_options_are_refused(shelf: Shelf, capsys, options: list[str], named: str):
    """In one line, before anything is sampled."""
    assert main(["evaluate", *shelf.options, *options]) == 2
    assert named in capsys.readouterr().err


def test_scores_hold_every_number_that_rows_average():
    """A measure that a score lacks would be found here and not after an hour."""
    assert set(MEASURES) <= {field.name for field in fields(VideoScore)}
