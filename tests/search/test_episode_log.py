"""The log of a search on disk: what is written is read again bit for bit, and what is no log is refused."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from made_up_episodes import episode

from ffgym.errors import DataError
from ffgym.search.log import Recorder, read_log


def written(log, *episodes):
    with Recorder(log) as recorder:
        for each in episodes:
            recorder.record(each)
    return log


class TestReading:
    @pytest.mark.parametrize("line", ["{", "[1, 2]", '{"index": 0}', '{"action": 3, "kept": 4}', "null"])
    def test_a_line_that_is_no_episode_is_refused_with_its_number(self, line, tmp_path):
        log = written(tmp_path / "broken.jsonl", episode(0, 0, 0.5))
        log.write_text(f"{log.read_text()}{line}\n")
        with pytest.raises(DataError, match=r"broken.jsonl, line 2 is no episode, or a damaged one: ") as raised:
            read_log(log)
        assert "Delete the file" in raised.value.hint

    @pytest.mark.parametrize("reward", ["NaN", "-Infinity", "1" + "0" * 400])
    def test_a_reward_that_is_no_finite_number_is_refused(self, reward, tmp_path):
        log = written(tmp_path / "broken.jsonl", episode(0, 0, 0.5), episode(1, 0, 0.25))
        log.write_text(log.read_text().replace('"reward": 0.25', f'"reward": {reward}'))
        with pytest.raises(DataError, match=r"broken.jsonl, line 2 is no episode"):
            read_log(log)

    def test_an_episode_survives_the_round_trip_bit_for_bit(self, tmp_path):
        action = np.random.default_rng(0).uniform(-1, 1, 6)
        sent = replace(episode(0, 1, 0.1 + 0.2, action=action), loss=math.nan, failed=True)
        (got,) = read_log(written(tmp_path / "episodes.jsonl", sent)).episodes
        np.testing.assert_array_equal(got.action, sent.action)
        assert got.action.dtype == np.float32
        assert math.isnan(got.loss)
        indifferent = {"action": None, "loss": None}
        assert {**vars(got), **indifferent} == {**vars(sent), **indifferent}
        assert isinstance(got.kept, tuple)

    def test_a_line_that_is_not_whole_is_left_out_and_left_alone(self, tmp_path):
        """The run that writes the log may be about to end it."""
        log = written(tmp_path / "live.jsonl", *(episode(i, 0, 0.5) for i in range(3)))
        log.write_bytes(torn := log.read_bytes() + '{"origin": "\u00fc'.encode()[:-1])
        assert len(read_log(log).episodes) == 3
        assert log.read_bytes() == torn

    def test_an_empty_log_is_no_episodes(self, tmp_path):
        log = tmp_path / "episodes.jsonl"
        log.touch()
        assert read_log(log).episodes == ()


class TestRecorder:
    @pytest.fixture
    def now(self, monkeypatch):
        """A clock that stands still until a test moves it."""
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        return now

    def test_writes_what_is_new_and_times_it(self, now, tmp_path):
        log = tmp_path / "episodes.jsonl"
        with Recorder(log) as recorder:
            for index in range(3):
                now[0] += 2.0
                recorder.record(episode(index, 0, 0.5))
                assert len(read_log(log).episodes) == index + 1, "each is on disk as soon as it is known"
        assert recorder.seconds == read_log(log).seconds == 6.0

    def test_neither_writes_nor_times_what_is_replayed(self, now, tmp_path):
        log = tmp_path / "episodes.jsonl"
        with Recorder(log) as first:
            now[0] += 2.0
            first.record(episode(0, 0, 0.5))
        with Recorder(log) as again:
            assert [e.index for e in again.earlier.episodes] == [0]
            for index in range(2):
                now[0] += 5.0
                again.record(episode(index, 0, 0.5))
        assert [e.index for e in read_log(log).episodes] == [0, 1]
        assert again.seconds == read_log(log).seconds == 2.0 + 5.0

    def test_a_torn_line_goes_without_the_others_being_written_again(self, tmp_path, small_files):
        """What tears a line is a full disk, which would take them too."""
        log = written(tmp_path / "torn.jsonl", *(episode(i, 0, 0.5) for i in range(3)))
        whole = log.read_bytes()
        log.write_bytes(whole + b'{"origin": ')
        with small_files(1), Recorder(log):  # a disk that is still full
            assert log.read_bytes() == whole

    def test_without_a_log_it_keeps_the_time_alone(self, now):
        with Recorder(None) as recorder:
            now[0] += 2.0
            recorder.record(episode(0, 0, 0.5))
        assert recorder.earlier.episodes == ()
        assert recorder.seconds == 2.0
