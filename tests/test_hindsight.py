"""Hindsight values against enumeration of all futures, and against the beam search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.hindsight import Grid, hindsight_values
from netllm_lib.abr.optimum import continuations
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import BandwidthModel, generate_traces, generate_video

VIDEO = generate_video("video", seed=3)
SLOW = BandwidthModel(median_mbps=0.8, samples=90)  # short enough to start again within an episode


def simulator(traces: int, repeats: int = 1, noise: bool = False) -> Simulator:
    found = generate_traces("t", traces, 5, SLOW)
    return Simulator(found, VIDEO, sound_episodes(found, seed=1, repeats=repeats, noise=noise))


def enumerated(playing: Simulator, levels: np.ndarray) -> np.ndarray:
    """[N, chunks, 6]: for every level at every chunk, the best sum over all ways to go on."""
    episodes, chunks = levels.shape
    values = np.full((episodes, chunks, LEVELS), -np.inf)
    for chunk in range(1, chunks):
        for tail in itertools.product(range(LEVELS), repeat=chunks - chunk):
            tried = levels.copy()
            tried[:, chunk:] = tail
            total = playing.replay(tried).reward[:, chunk:].sum(axis=1)
            values[:, chunk, tail[0]] = np.maximum(values[:, chunk, tail[0]], total)
    return values


def test_values_are_those_of_all_futures_tried() -> None:
    playing = simulator(traces=3, repeats=2)
    levels = np.random.default_rng(2).integers(0, LEVELS, (6, 5))
    exact = enumerated(playing, levels)
    errors = []
    for grid in (Grid(2.0, 2.0), Grid(0.5, 0.5), Grid(0.1, 0.1)):
        values = hindsight_values(playing, levels, grid)
        assert np.isnan(values[:, 0]).all()
        np.testing.assert_allclose(values[:, -1], exact[:, -1], atol=1e-9)  # nothing is interpolated there
        errors.append(np.abs(values - exact)[:, 1:].mean())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03


def test_a_whole_episode_agrees_with_the_beam_search() -> None:
    playing = simulator(traces=2)
    levels = np.random.default_rng(4).integers(0, 4, (2, CHUNKS))
    searched = continuations(playing, levels)[:, 1:]
    values = hindsight_values(playing, levels, Grid(0.5, 0.5))[:, 1:]
    assert np.abs(values - searched).mean() < 0.5  # of sums over up to 47 chunks
    chosen = np.take_along_axis(searched, values.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    assert (searched.max(axis=-1) - chosen).mean() < 0.03  # what following the table would lose


def test_other_episodes_change_no_value() -> None:
    playing = simulator(traces=3, repeats=2)
    levels = np.random.default_rng(6).integers(0, LEVELS, (6, CHUNKS))
    whole = hindsight_values(playing, levels)
    np.testing.assert_array_equal(whole[[4]], hindsight_values(playing.part([4]), levels[[4]]))


def test_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="play without noise"):
        hindsight_values(simulator(traces=1, noise=True), np.zeros((1, CHUNKS), int))
