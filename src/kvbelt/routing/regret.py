"""Whether splitting is switched off, by what all whole would have done with the same requests. Pure."""

from dataclasses import dataclass

#: Splitting loses if a share larger by this much would have been within the levels without it. A replay of two hundred
#: requests is as exact as that.
MARGIN = 0.02

#: So many windows in succession must say the same.
WINDOWS = 2


@dataclass(slots=True)
class SplitSwitch:
    off: bool = False
    against: int = 0  #: the latest windows in succession that speak against how it stands

    def judge(self, regret: float) -> bool:
        """Of one more window, the share within the levels that splitting has cost. Returns whether it has switched."""
        self.against = self.against + 1 if (regret <= 0.0 if self.off else regret > MARGIN) else 0
        if self.against < WINDOWS:
            return False
        self.off, self.against = not self.off, 0
        return True
