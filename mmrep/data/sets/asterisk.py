"""What the telephone exchange Asterisk says to callers: the same prompts, spoken by five people in five languages.

The data are the Debian packages ``asterisk-core-sounds-{en,es,fr,it,ru}-wav`` and ``asterisk-prompt-it-menardi-wav``,
read from where they lie: one folder a voice, such as ``en_US_f_Allison``, with some 500 clips of 8 kHz. They name who
speaks (CC-BY-SA 3.0; the Russian voice CC-BY 3.0; of the second Italian one its package has the terms). One of the five
speaks English and Spanish, and two speak Italian, so a person can be told from a language. Each has a studio of their
own, too: what tells the voices apart may be that.
"""

from __future__ import annotations

import re
from typing import Any

from mmrep.config import ConfigError, config
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import debian_version, find, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import SplitConfig, part_of

ROOT = "/usr/share/asterisk/sounds"
PACKAGES = (
    *(f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")),
    "asterisk-prompt-it-menardi-wav",
)

_VOICE = re.compile(r"(?P<language>[a-z]{2})_[A-Z]{2}_[fm]_(?P<speaker>\w+)")
_NO_SPEECH = re.compile(r"silence/.*|beep|beeperr|(?:a|de)scending-2tone|tt-monkeys")


@config
class AsteriskConfig(SplitConfig):
    """root: the folder of the voices; None = where Debian installs it, or ``./usr/share/asterisk/sounds``.

    voices: which of its folders; None = all that are there.
    """

    root: str | None = None
    voices: list[str] | None = None
    label: str | None = "speaker"


class Asterisk(RowSource):
    """One row per voice and prompt; the id is the clip's place below the root.

    Columns: ``speech`` (path of a WAV file), ``speaker``, ``language`` (two letters), ``voice`` (its folder) and
    ``prompt`` (the clip's place below that, such as ``digits/7``). Silence, beeps and a chorus of monkeys are left out.
    The split goes by prompt: what is said in a held-out clip was not heard in training from any voice.
    """

    Config = AsteriskConfig
    columns = ("speech", "speaker", "language", "voice", "prompt")
    config: AsteriskConfig

    def __init__(self, config: AsteriskConfig) -> None:
        super().__init__(config)
        self._root = find(config.root, ROOT, "*_*_*_*/*.wav", f"apt-get install {' '.join(PACKAGES)}")
        names = sorted(folder.name for folder in self._root.iterdir())
        found = {name: match.groupdict() for name in names if (match := _VOICE.fullmatch(name))}
        if problems := wrong_names("voices", config.voices or [], set(found), "folder"):
            raise ConfigError(problems)
        rows: list[tuple[str, dict[str, Any]]] = []
        for voice in config.voices or found:
            for path in sorted((self._root / voice).rglob("*.wav")):
                prompt = path.relative_to(self._root / voice).with_suffix("").as_posix()
                if _NO_SPEECH.fullmatch(prompt) or config.split not in ("all", part_of(prompt, config)):
                    continue
                rows.append((f"{voice}/{prompt}", {**found[voice], "speech": path, "voice": voice, "prompt": prompt}))
        self.set_rows(rows, f"split: no prompt falls in {config.split!r}")

    def fingerprint(self) -> str:
        """The config, the versions of the packages, and names and sizes of the files."""
        versions = [debian_version(package, self._root) for package in PACKAGES]
        return f"asterisk:{self.config}:{versions}:{sizes(self._root.rglob('*.wav'), self._root)}"
