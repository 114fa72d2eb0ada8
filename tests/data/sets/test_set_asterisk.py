"""Prompts by voice: who speaks, what is no speech, and which clips are apart."""

from __future__ import annotations

import pytest
from set_fakes import files

from mmrep.config import ConfigError, component

PROMPTS = ("activated", "digits/7", "letters/a", "tone")
NO_SPEECH = ("silence/1", "beep", "beeperr", "ascending-2tone", "tt-monkeys")
VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "it_IT_m_Carlo")


@pytest.fixture
def sounds(tmp_path):
    clips = {f"{voice}/{prompt}.wav": "RIFF" for voice in VOICES for prompt in PROMPTS + NO_SPEECH}
    other = {"digits/1.wav": "", "fr/activated.wav": "", "en_US_f_Allison/notes.txt": ""}
    return files(tmp_path / "share/sounds", {**clips, **other})


def build(root, **fields):
    return component("sources", "asterisk", root=str(root), **{"split": "all", **fields}).build()


def test_a_row_is_a_prompt_in_a_voice(sounds):
    source = build(sounds)
    assert [sample.id for sample in source] == [f"{voice}/{prompt}" for voice in VOICES for prompt in PROMPTS]
    assert source[5].fields == {
        "speech": sounds / "es_MX_f_Allison/digits/7.wav",
        "speaker": "Allison",
        "language": "es",
        "voice": "es_MX_f_Allison",
        "prompt": "digits/7",
    }
    assert [source[i].label for i in (0, 5, 11)] == ["Allison", "Allison", "Carlo"]
    assert [sample.label for sample in build(sounds, voices=["it_IT_m_Carlo"], label="language")] == ["it"] * 4


def test_a_prompt_is_in_one_part_in_every_voice(sounds):
    many = files(sounds, {f"{voice}/{number}.wav": "RIFF" for voice in VOICES for number in range(60)})
    parts = {part: {row["prompt"] for row in build(many, split=part)._rows} for part in ("train", "validation", "test")}
    assert all(parts.values())
    assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 64
    assert len(build(many, split="test")) == 3 * len(parts["test"])


def test_what_is_wrong_is_said(sounds, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder 'it_IT_m_Karlo'; did you mean 'it_IT_m_Carlo'"):
        build(sounds, voices=["it_IT_m_Karlo"])
    with pytest.raises(ConfigError, match=r"install the data with `apt-get install asterisk-core-sounds-en-wav"):
        build(tmp_path)


def test_the_fingerprint_follows_clips_and_config(sounds):
    before = build(sounds).fingerprint()
    assert before == build(sounds).fingerprint() != build(sounds, voices=["it_IT_m_Carlo"]).fingerprint()
    (sounds / "it_IT_m_Carlo/letters/a.wav").write_text("another")
    assert build(sounds).fingerprint() != before
