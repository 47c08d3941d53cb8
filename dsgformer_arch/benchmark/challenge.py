"""The efficient real-world deblurring challenges of AIM 2025 and NTIRE 2026: rules, and results as reported.

Both are on RSBlur (Rim et al., ECCV 2022) and have the same rules.  The final test of AIM 2025 had 420 new
pairs of 84 scenes; the results of NTIRE 2026 are those of its public test on RSBlur's own test split.  The
PSNR of the two years can therefore not be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDTH, HEIGHT = 1920, 1200
"""Size of RSBlur's images in pixels, at which MACs are counted."""

MOST_PARAMETERS = 5_000_000
"""How many parameters a network may have."""

MOST_MACS = 200_000_000_000
"""How many MACs restoring one image may take."""


@dataclass(frozen=True)
class Entry:
    """A result as a challenge or a paper reports it; nothing of it was measured here.

    Attributes:
        challenge: and its year.
        rank: by the challenge's score; None for its baseline.
        method: or the team, where the method has no published name.
        psnr: in dB.
        ssim: at most 1.
        source: of the numbers.
        parameters: in millions; None where not published.
        macs: in G, at 1920×1200; None where not published.
        note: what to know beside.
    """

    challenge: str
    rank: int | None
    method: str
    psnr: float
    ssim: float
    source: str
    parameters: float | None = None
    macs: float | None = None
    note: str = ''


_FSM_NET = 'arXiv 2605.31400, table 1, and the README of ThuanLy-0092/FSMNet-Efficient-Real-World-Deblurring'
_AIM = 'arXiv 2510.12788, as summaries of the report quote it'

LEADERBOARD = (
    Entry('NTIRE 2026', 1, 'jingjing et al.', 33.390, 0.8585, _FSM_NET),
    Entry(
        'NTIRE 2026', 2, 'FSM-Net', 33.144, 0.8516, _FSM_NET, 4.94, 159.35,
        'mean of four passes, 0.276 s on an RTX 5090; one pass 33.006 dB, 0.069 s',
    ),
    Entry('NTIRE 2026', 3, 'weichow', 32.883, 0.8467, _FSM_NET),
    Entry('NTIRE 2026', 4, 'licheng', 32.805, 0.8473, _FSM_NET, note='first of 2025'),
    Entry('NTIRE 2026', 8, 'geometric_ai', 32.216, 0.8371, _FSM_NET, note='0.78 s'),
    Entry('AIM 2025', 1, 'NAFRepLocal', 31.130, 0.843, _AIM, 4.76, 198.25),
    Entry('AIM 2025', 2, 'RestormerL', 31.100, 0.840, _AIM, 1.41, 199.39),
    Entry('AIM 2025', 3, 'IPIU, NAFNet with augmentation', 30.492, 0.832, _AIM, 4.35, 146.33),
    Entry('AIM 2025', 4, 'SA-NAFNet', 30.189, 0.819, _AIM, 4.51, 172.2),
    Entry(
        'AIM 2025', None, 'NAFNet-C16-L28', 30.173, 0.826, _AIM, 4.35, 146.33,
        'the baseline; 32.42 dB on the public test split',
    ),
)  # fmt: skip
"""Reported results, the newer challenge first."""
