"""Sigmas are the published ones, presets are found by what a file says, else by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sneakpeek_core.guidance import FutureGuidance
from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.presets import (
    FOUR_STEPS,
    PRESETS,
    Preset,
    own_fields,
    preset_for,
    stated_fields,
)
from sneakpeek_core.sigmas import few_step_sigmas, renoise, shifted, uniform_sigmas

SMALL = ModelConfig(dim=1536, ffn_dim=8960, layers=30)


@pytest.mark.parametrize(
    ("listed", "shift", "warp", "expected"),
    [
        ((1000, 750, 500, 250), 5, True, (1000, 937.5, 833.3333, 625)),
        ((1000, 750, 500, 250), 8, True, (1000, 960, 888.889, 727.273)),
        ((1000, 500), 5, True, (1000, 833.3333)),
        ((1000, 500), 8, True, (1000, 888.889)),
        ((1000, 800, 600, 400, 200), 5, True, (1000, 952.381, 882.3529, 769.2308, 555.5556)),
        ((1000, 100), 5, True, (1000, 357.1429)),
        ((1000, 740, 500, 260), 8, True, (1000, 957.93, 888.889, 737.59)),
        ((1000, 757, 522), 8, False, (1000, 757, 522)),
        ((1000, 937, 833, 625, 0), 5, False, (1000, 937, 833, 625)),
    ],
)
def test_few_step_lists_give_the_published_timesteps(listed, shift, warp, expected):
    *sigmas, last = few_step_sigmas(listed, shift, warp)
    assert last == 0.0
    assert [1000 * s for s in sigmas] == pytest.approx(expected, abs=0.005)


def test_timesteps_keep_their_fraction():
    assert few_step_sigmas(FOUR_STEPS, 5, True) == (1.0, 0.9375, 5 / 6, 0.625, 0.0)


def test_causvid_list_is_a_warped_one():
    assert [1000 * shifted(t / 1000, 8) for t in (280, 120)] == pytest.approx([757, 522], abs=1)


def test_the_smallest_level_of_the_training_table():
    assert 1000 * shifted(0.001, 5) == pytest.approx(4.98, abs=0.005)
    assert 1000 * shifted(0.001, 8) == pytest.approx(7.94, abs=0.005)


def test_uniform_sigmas_fall_from_one_to_zero():
    sigmas = uniform_sigmas(50, 5.0)
    assert (len(sigmas), sigmas[0], sigmas[25], sigmas[-1]) == (51, 1.0, shifted(0.5, 5.0), 0.0)
    assert list(sigmas) == sorted(sigmas, reverse=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: few_step_sigmas((), 5, True),
        lambda: few_step_sigmas((0,), 5, True),
        lambda: few_step_sigmas((1000, 1000), 5, True),
        lambda: few_step_sigmas((500, 1000), 5, True),
        lambda: few_step_sigmas((1001,), 5, True),
        lambda: few_step_sigmas((1000, -1), 5, True),
        lambda: few_step_sigmas((1000, float("nan")), 5, True),
        lambda: few_step_sigmas((1000,), 0, True),
        lambda: uniform_sigmas(0, 5),
        lambda: uniform_sigmas(10**9, 5),
        lambda: uniform_sigmas(5, float("nan")),
    ],
)
def test_impossible_schedules_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_renoise_is_the_flow_between_clean_and_noise():
    clean, noise = torch.full((2, 3), 4.0), torch.full((2, 3), -1.0)
    assert torch.equal(renoise(clean, 0.0, noise), clean)
    assert torch.equal(renoise(clean, 1.0, noise), noise)
    assert torch.equal(renoise(clean, 0.25, noise), torch.full((2, 3), 2.75))


def test_the_table_holds_what_the_families_publish():
    kept = {n: (p.chunk, p.window, p.sink, p.positions, p.shift) for n, p in PRESETS.items()}
    assert kept["self_forcing"] == (3, None, 0, "absolute", 5.0)
    assert kept["causal_forcing_framewise"] == (1, None, 0, "absolute", 5.0)
    assert kept["longlive"] == (3, 9, 3, "absolute", 5.0)
    assert kept["reward_forcing"] == (3, 6, 3, "relative", 5.0)
    assert kept["krea_14b"][1:4] == (5, 1, "relative")
    assert kept["tiny"] == (3, 12, 1, "relative", 3.0)
    assert PRESETS["krea_14b"].sigmas == (1.0, 0.937, 0.833, 0.625, 0.0)
    two = PRESETS["causal_forcing_framewise_2step"]
    assert (len(two.sigmas), len(two.first_sigmas)) == (3, 5)
    undistilled = PRESETS["ar_diffusion"]
    assert (len(undistilled.sigmas), undistilled.solver, undistilled.cfg) == (51, "euler", 3.0)


def test_every_preset_is_named_sourced_and_runnable_or_says_why():
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.source and preset.licence
        if name in ("rolling_forcing", "wan_t2v"):
            with pytest.raises(ValueError, match=f"{name} weights cannot be streamed"):
                preset.check_runnable()
        else:
            preset.check_runnable()


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("self_forcing_dmd.pt", "generator_ema", "self_forcing"),
        ("SELF_FORCING_SID_V2.PT", "", "self_forcing"),
        ("chunkwise/causal_forcing.pt", "generator", "causal_forcing"),
        ("framewise/causal_forcing.pt", "generator_ema", "causal_forcing_framewise"),
        ("downloads/causal_forcing.pt", "generator_ema", "causal_forcing_framewise"),
        ("downloads/causal_forcing.pt", "generator", "causal_forcing"),
        ("causal-forcing++/framewise-2step.pt", "", "causal_forcing_framewise_2step"),
        ("framewise-1step.pt", "", "causal_forcing_framewise_1step"),
        ("framewise/ar_diffusion.pt", "", "ar_diffusion_framewise"),
        ("chunkwise/longvideo.pt", "", "rolling_forcing"),
        ("autoregressive_checkpoint/model.pt", "generator", "causvid"),
        ("longlive_base.pt", "generator", "longlive"),
        ("rewardforcing.pt", "", "reward_forcing"),
        ("ema_model.pt", "", "infinite_forcing"),
        ("krea-realtime-video-14b.safetensors", "", "krea_14b"),
        ("shotstream_merged.pt", "", "shotstream"),
        ("wan2.1_t2v_1.3B_fp16.safetensors", "", "wan_t2v"),
    ],
)
def test_published_file_names_are_known(path: str, source: str, name: str):
    preset = preset_for(path, {}, SMALL, source)
    assert preset.name == name and "its file name" in preset.recognised_by
    assert replace(preset, recognised_by="") == PRESETS[name]


@pytest.mark.parametrize("path", ["model.pt", "my_self_forcing_dmd.pt", "video.safetensors"])
def test_other_names_get_the_default_and_are_told_so(path: str):
    preset = preset_for(Path(path), {}, SMALL)
    assert (preset.name, "the default" in preset.recognised_by) == ("self_forcing", True)


def test_what_a_file_states_wins_over_its_name():
    preset = preset_for("longlive_base.pt", {"sneakpeek.preset": "tiny"}, SMALL)
    assert preset == replace(PRESETS["tiny"], recognised_by="the file's metadata")
    stated = {"preset": "tiny", "chunk": 1, "timesteps": [1000, 500], "solver": "renoise", "x": 1}
    preset = preset_for("a", {"sneakpeek": json.dumps(stated)}, SMALL)
    assert (preset.chunk, preset.timesteps, preset.window) == (1, (1000.0, 500.0), 12)
    assert preset.solver == "renoise"


def test_a_file_states_its_guidance():
    """Named settings on top of the defaults, or none at all."""
    for stated, guidance in (({"count": 1}, FutureGuidance(count=1)), (None, None)):
        text = json.dumps({"preset": "tiny", "guidance": stated})
        assert preset_for("a", {"sneakpeek": text}, SMALL).guidance == guidance


def test_every_preset_can_be_stated():
    """A file that states all of a preset's fields gives that preset, whatever it is called."""
    for preset in PRESETS.values():
        stated = {"sneakpeek": json.dumps(stated_fields(preset))}
        found = preset_for("any.safetensors", stated, SMALL)
        assert replace(found, recognised_by="") == preset


def test_metadata_that_is_not_about_sampling_leaves_the_name_to_decide():
    stated = {"sneakpeek": json.dumps({"text_len": 32})}
    assert preset_for("longlive_base.pt", stated, SMALL).name == "longlive"
    assert own_fields(stated) == {"text_len": 32}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("[", "not a JSON object"),
        ("5", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"preset": "no"}', "preset 'no' in the metadata is unknown; known: self_forcing"),
        ('{"chunk": "3"}', "chunk '3' in the metadata must be int"),
        ('{"chunk": true}', "must be int"),
        ('{"chunk": 0}', "chunk 0 must be at least 1"),
        ('{"window": 2}', "window 2 is smaller than chunk 3"),
        ('{"timesteps": [1000, "x"]}', "must be numbers"),
        ('{"timesteps": [500, 1000]}', "must fall strictly"),
        ('{"steps": 1000000000}', "steps 1000000000 must be 1 to 1000"),
        ('{"shift": NaN}', "shift nan must be above 0"),
        ('{"fps": 0}', "bad fps 0"),
        ('{"solver": "magic"}', "solver 'magic' must be one of"),
        ('{"guidance": {"count": 0}}', "horizon 0"),
        ('{"guidance": {"magic": 1}}', "magic"),
        ('{"guidance": 2}', "guidance 2 in the metadata must be dict"),
    ],
)
def test_malformed_metadata_is_refused_in_words(stated: str, words: str):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        preset_for("a.safetensors", {"sneakpeek": stated}, SMALL)


def test_a_preset_is_a_value():
    changed = replace(PRESETS["self_forcing"], shift=8.0)
    assert changed.sigmas[1] == 0.96 and PRESETS["self_forcing"].sigmas[1] == 0.9375
    assert Preset(name="x").sigmas == PRESETS["self_forcing"].sigmas
