"""The numbers of scores that top-k sparse attention keeps."""

from fractions import Fraction

TOP_K_RATIOS = (Fraction(1, 2), Fraction(2, 3), Fraction(3, 4), Fraction(4, 5))
"""k_n over the width of a head, n = 1..4: the values of DRSformer (CVPR 2023), also used by DSGformer."""
